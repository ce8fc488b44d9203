"""What a run's plan does, and whether it does anything, before the first step."""

from collections.abc import Iterator
from dataclasses import replace

from jaxckpt.compiled.report import MemoryReport
from jaxckpt.memory.built_step import BuiltStep, stack_bytes
from jaxckpt.memory.explain import explain
from jaxckpt.memory.findings import peak_not_below_none
from jaxckpt.memory.measure import compile_step
from jaxckpt.plans import as_plan

# A plan that should save less of the peak than this is compared with `none` by compiling that too.
_DOUBTFUL = 0.1


def explained(step: BuiltStep) -> Iterator[str]:
    """Yields the residuals of one block as a table, for each stage of the step's plan."""
    assert step.block is not None and step.plan is not None  # as `build` makes a step
    block, params_i, carry, *consts = step.block
    for stage in step.plan.stages:
        plan = str(replace(stage, count=None))
        found = explain(block, params_i, carry, *consts, plan=plan, num_blocks=stage.count)
        yield f"{plan} on {stage.count} blocks\n{found}"


def needless(step: BuiltStep, report: MemoryReport) -> list[str]:
    """Returns a line if the plan's compiled peak is not below that of `none`.

    `none` is compiled only where the stack's residuals leave it in doubt.
    """
    assert step.block is not None and step.plan is not None and step.baseline is not None
    none = as_plan("none").bind(step.plan.bound_count)
    if step.plan == none:
        return []
    saved = stack_bytes(none, *step.block) - stack_bytes(step.plan, *step.block)
    if saved > _DOUBTFUL * report.peak_bytes:
        return []
    alone = replace(step, fn=step.baseline, plan=None, baseline=None, block=None)
    _, without = compile_step(alone)
    return [str(finding) for finding in peak_not_below_none(step.plan, report, without)]
