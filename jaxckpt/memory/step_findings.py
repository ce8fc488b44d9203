"""Checks of compiled steps for plans that do nothing; see `findings.py`."""

import math
import re
from collections.abc import Iterable

from jax.extend import core

from jaxckpt.memory.block_findings import Finding
from jaxckpt.memory.buffers import Buffer
from jaxckpt.memory.flat import Flat, Step, bodies, flatten
from jaxckpt.memory.report import MemoryReport
from jaxckpt.memory.units import gib
from jaxckpt.plans import Plan, as_plan

# A product is a `dot`, on TPU a `convolution`, on GPU often a library call.
_PRODUCT = re.compile(r"=\s+\S+\s+(?:dot|convolution)\(")
_LIBRARY = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul)[^"]*"')


def undone_remat(
    plan: str | Plan,
    compiled_text: str,
    jaxpr: core.ClosedJaxpr,
    none_jaxpr: core.ClosedJaxpr,
) -> tuple[Finding, ...]:
    """Returns a finding if the compiled step makes no matmul again although its jaxpr does.

    Args:
      plan: The plan of the step.
      compiled_text: `compiled.as_text()` of the step under the plan.
      jaxpr: Of the same step.
      none_jaxpr: Of the step under `none`, at the same unroll; it need not be compiled.
    """
    expected, plain = count_products(jaxpr), count_products(none_jaxpr)
    made = _num_compiled(compiled_text)
    if expected <= plain or made > plain:
        return ()
    message = (
        f"plan {str(plan)!r} is undone by the compiler: {made} matmuls are left of the {expected} "
        f"that the step asks for, {plain} without remat; common-subexpression elimination merged "
        "unrolled blocks with their recomputation; use unroll=1 (a loop keeps them apart)"
    )
    return (Finding(code="remat-undone", message=message),)


def count_products(jaxpr: core.ClosedJaxpr) -> int:
    """Returns how many matrix products a program has when compiled; a loop's body counts once.

    Of an unrolled scan the body counts as often as it is written out.
    """
    return _num_products(flatten(jaxpr))


def _num_products(flat: Flat) -> int:
    return sum(
        (step.name == "dot_general")
        + _num_copies(step) * sum(_num_products(body) for body in bodies(step))
        for step in flat.live_steps()
    )


def _num_copies(step: Step) -> int:
    if step.name != "scan":
        return 1
    length, unroll = step.params["length"], int(step.params["unroll"])
    return min(length, unroll + length % unroll)


def _num_compiled(text: str) -> int:
    return len(_PRODUCT.findall(text)) + len(_LIBRARY.findall(text))


def peak_not_below_none(
    plan: str | Plan, report: MemoryReport, none_report: MemoryReport
) -> tuple[Finding, ...]:
    """Returns a finding if a plan's compiled peak is not below that of `none`.

    Args:
      plan: The plan of `report`; of `none` itself there is nothing to find.
      report: Of the step under the plan.
      none_report: Of the same step under `none`, on the same target.
    """
    if all(stage.schedule == "none" for stage in as_plan(plan).stages):
        return ()
    if report.peak_bytes < none_report.peak_bytes:
        return ()
    message = (
        f"plan {str(plan)!r} saves no memory: its peak is {gib(report.peak_bytes)}, that of none "
        f"is {gib(none_report.peak_bytes)}; use none, which is faster, or look for what else sets "
        "the peak (optimizer state, the loss head, a single block)"
    )
    return (Finding(code="peak-not-below-none", message=message),)


def head_sets_peak(
    buffers: Iterable[Buffer], *, tokens: int, vocab_size: int, stack_bytes: int
) -> tuple[Finding, ...]:
    """Returns a finding if logits outweigh, at the peak, all that the stack's plan can change.

    Args:
      buffers: `MemoryReport.buffers`, of which no two share memory.
      tokens: Tokens of one step on one device.
      vocab_size: Size of the vocabulary on one device.
      stack_bytes: What the stack keeps, and one block needs while it is reversed, on one device:
        L times `Explanation.saved_bytes`, plus `Explanation.residual_bytes`.
    """
    logits = [buffer for buffer in buffers if _is_logits(buffer, tokens, vocab_size)]
    size = sum(buffer.size_bytes for buffer in logits)
    if size <= stack_bytes:
        return ()
    message = (
        f"the loss head sets the peak, not the stack: logits {logits[0].shape} take {gib(size)} "
        f"there, all that the stack keeps {gib(stack_bytes)}; no plan for the stack helps, a loss "
        "in chunks of tokens does (jaxckpt.losses)"
    )
    return (Finding(code="head-sets-peak", message=message),)


def _is_logits(buffer: Buffer, tokens: int, vocab_size: int) -> bool:
    """Whether a buffer is `[..., vocab_size]` with all tokens before, in any layout of them."""
    found = re.fullmatch(r"\w+\[([\d,]+)\].*", buffer.shape)
    if not found:
        return False
    *rows, last = map(int, found[1].split(","))
    return last == vocab_size and math.prod(rows) == tokens
