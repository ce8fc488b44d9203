"""A step with its plan and block; its report has seconds, recomputed FLOPs and findings.

    step = BuiltStep(fn=train_step, args=(state, tokens), donate_argnums=0, plan="sqrt",
                     baseline=step_without_remat, block=(block, params_i, x))
    report = annotate(step, jaxpr, report, rates)

`annotate` adds to a report the step's estimated seconds, the FLOPs that its plan recomputes, and
findings about parts of the plan that do nothing. An `Entry`'s function may return a `BuiltStep`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxckpt.compiled.report import MemoryReport
from jaxckpt.costs.flops import count_flops
from jaxckpt.costs.roofline import Rates, estimate
from jaxckpt.memory import findings
from jaxckpt.memory.explain import explain
from jaxckpt.plans import Plan, Stage, as_plan
from jaxckpt.schedules.actions import Load, Record
from jaxckpt.schedules.of_stage import stack_schedule_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuiltStep:
    """A step to be compiled; with a plan, baseline and block its report has findings too.

    Attributes:
      fn: The step.
      args: The step's arguments, arrays or abstract.
      donate_argnums: The positions of arguments whose memory outputs may reuse.
      plan: The plan of the step's stack, bound to the number of blocks; None for no findings.
      baseline: The step without remat, at the same unroll; None to leave out checks against it.
      block: `(block, params_i, carry, *consts)` of the stack; None to leave out checks of the
        block.
      unroll: The number of blocks unrolled in one trip of the stack's loop.
      compiler_options: XLA's options by name.
      tokens: The rows of the loss head: the tokens of one microbatch.
      vocab_size: The columns of the loss head.
    """

    fn: Callable
    args: Sequence[Any]
    donate_argnums: int | Sequence[int] = ()
    plan: Plan | None = None
    baseline: Callable | None = None
    block: tuple | None = None
    unroll: int = 1
    compiler_options: Mapping[str, int | str] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    vocab_size: int = 0


def annotate(
    step: BuiltStep,
    jaxpr: core.ClosedJaxpr,
    report: MemoryReport,
    *,
    rates: Rates | None,
    compiled_text: Callable[[], str | None] | None = None,
) -> MemoryReport:
    """Returns a report with seconds, recomputed FLOPs and findings of its step.

    Args:
      step: The step.
      jaxpr: The jaxpr that was compiled.
      report: The report of the compiled step.
      rates: The rates of the chip; None if the rates are unknown.
      compiled_text: Returns the compiled program's text, in which matrix products are counted; None
        if the backend's text does not show every product. Called only for unrolled blocks.
    """
    baseline = seconds = recomputed = None
    if step.baseline is not None:
        baseline = jax.make_jaxpr(step.baseline)(*step.args)
        if report.flops is not None:
            recomputed = report.flops - count_flops(baseline)
    if rates is not None:
        # A jaxpr covers all devices together. The estimate assumes that communication does not
        # overlap computation.
        seconds = estimate(jaxpr, rates.times(report.num_devices)).seconds
        seconds += report.collective_seconds or 0.0
    found = list(block_findings(step, report, rates))
    text = compiled_text() if compiled_text is not None and step.unroll > 1 else None
    if step.plan is not None and baseline is not None and text is not None:
        found += findings.undone_remat(step.plan, text, jaxpr, baseline)
    return dataclasses.replace(
        report,
        estimated_seconds=seconds,
        recomputed_flops=recomputed,
        findings=tuple(map(str, found)),
    )


def block_findings(
    step: BuiltStep, report: MemoryReport, rates: Rates | None
) -> Iterator[findings.Finding]:
    """Yields the findings about a step's plan and block; none without a plan and a block.

    Args:
      step: The step.
      report: The report of the compiled step.
      rates: The rates of the chip; None if the rates are unknown.
    """
    if step.plan is None or step.block is None:
        return
    yield from findings.findings_of_block(*step.block, plan=step.plan)
    if rates is not None:
        yield from findings.carry_slow_to_move(*step.block, plan=step.plan, rates=rates)
    # A step that leaves half of the device's memory free needs no advice.
    if report.usable_bytes is not None and 2 * report.peak_bytes > report.usable_bytes:
        yield from findings.block_sets_peak(*step.block, plan=step.plan, report=report)
    if step.vocab_size:
        sizes = {"tokens": step.tokens, "vocab_size": step.vocab_size}
        stack = stack_bytes(step.plan, *step.block)
        yield from findings.head_sets_peak(report.buffers, **sizes, stack_bytes=stack)


def stack_bytes(plan: str | Plan, block: Callable, params_i, carry, *consts) -> int:
    """Returns the device bytes that a stack keeps under a plan, plus one block's residuals.

    Args:
      plan: A plan bound to the number of blocks.
      block: `block(carry, params_i, *consts) -> carry`; arguments may be abstract.
      params_i: One block's parameters.
      carry: The block's input.
      *consts: Arrays that all blocks share.
    """
    found = [_kept_bytes(stage, block, params_i, carry, consts) for stage in as_plan(plan).stages]
    return sum(kept for kept, _ in found) + found[0][1]


def _kept_bytes(stage: Stage, block: Callable, params_i, carry, consts) -> tuple[int, int]:
    """Returns the bytes that a stage keeps when its last block has run, and a block's residuals."""
    plan = str(dataclasses.replace(stage, count=None))
    found = explain(block, params_i, carry, *consts, plan=plan)
    assert found.saved_bytes is not None  # a plan was given
    schedule = stack_schedule_of(stage)
    if schedule is None:
        return stage.bound_count * found.saved_bytes, found.residual_bytes
    recorded = next(a for a in schedule.actions if isinstance(a, Load | Record))
    segment = recorded.stop - recorded.start if isinstance(recorded, Record) else 1
    slots = 0 if stage.offloads_carry else schedule.peak_slots
    kept = slots * found.carry_bytes + (segment - 1) * found.saved_bytes
    return kept, found.residual_bytes
