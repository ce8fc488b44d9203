"""Checks of reports for plans that do not lower the peak; see `findings.py`. No JAX import."""

import math
import re
from collections.abc import Iterable

from jaxckpt.memory.buffers import Buffer
from jaxckpt.memory.finding import Finding
from jaxckpt.memory.report import MemoryReport
from jaxckpt.memory.units import gib
from jaxckpt.plans import Plan, as_plan


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
