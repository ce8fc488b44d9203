"""Checks before the first step: what a run's plan does, and whether it saves memory."""

from collections.abc import Iterator
from dataclasses import replace

from jaxckpt.compiled.report import MemoryReport
from jaxckpt.memory.built_step import BuiltStep, stack_bytes
from jaxckpt.memory.explain import explain
from jaxckpt.memory.finding import peak_not_below_none
from jaxckpt.memory.measure import compile_step
from jaxckpt.plans import as_plan
from jaxckpt.units import iec

# If a plan should save less than this share of the peak, `none` is compiled and compared.
_DOUBTFUL = 0.1


def explained(step: BuiltStep) -> Iterator[str]:
    """Yields the residuals of one block as a table, for each stage of the step's plan."""
    assert step.block is not None and step.plan is not None  # as `build` makes a step
    block, params_i, carry, *consts = step.block
    for stage in step.plan.stages:
        plan = str(replace(stage, count=None))
        found = explain(block, params_i, carry, *consts, plan=plan, num_blocks=stage.count)
        yield f"{plan} on {stage.count} blocks\n{found}"


def against_none(step: BuiltStep, report: MemoryReport) -> tuple[list[str], str]:
    """Returns findings about a plan that saves nothing, and a line about what a plan saves.

    Compiling `none` too would double the wait for the first step. So the peak of `none` is
    estimated: the plan's compiled peak, plus the residuals that the plan does not keep. Only a plan
    that should save little is compared with a compiled `none`. The line is empty for `none`.
    """
    assert step.block is not None and step.plan is not None and step.baseline is not None
    none = as_plan("none").bind(step.plan.bound_count)
    if step.plan == none:
        return [], ""
    saved = stack_bytes(none, *step.block) - stack_bytes(step.plan, *step.block)
    if saved > _DOUBTFUL * report.peak_bytes:
        return [], _gain(step, report, report.peak_bytes + saved, " (estimated)")
    alone = replace(step, fn=step.baseline, plan=None, baseline=None, block=None)
    _, without = compile_step(alone)
    found = [str(finding) for finding in peak_not_below_none(step.plan, report, without)]
    return found, "" if found else _gain(step, report, without.peak_bytes, "")


def _gain(step: BuiltStep, report: MemoryReport, none_bytes: int, how: str) -> str:
    assert step.plan is not None  # as `build` makes a step
    share = 100 * report.peak_bytes / none_bytes
    text = f"none needs {iec(none_bytes)}{how}: {step.plan.written} keeps {share:.0f} % of it"
    if again := report.recomputed_share:
        text += f" and recomputes {100 * again:.1f} % of the FLOPs"
    return text
