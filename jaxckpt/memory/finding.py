"""A finding, and the check that compares two reports; this module does not import JAX."""

import dataclasses

from jaxckpt.compiled.report import MemoryReport
from jaxckpt.plans import Plan, as_plan
from jaxckpt.units import iec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """A plan, or a part of a plan, that does nothing.

    Attributes:
      code: `dots-save-nothing`, `tag-on-output`, `tag-not-needed`, `remat-undone`,
        `peak-not-below-none`, `head-sets-peak`, `block-sets-peak` or `carry-slow-to-move`.
      message: One line with the fault and the advice.
    """

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


def peak_not_below_none(
    plan: str | Plan, report: MemoryReport, none_report: MemoryReport
) -> tuple[Finding, ...]:
    """Returns a finding if a plan's compiled peak is not below the peak of `none`.

    Args:
      plan: The plan of the step; `none` itself has no finding.
      report: The report of the step under the plan.
      none_report: The report of the step under `none`, on the same target.
    """
    if all(stage.schedule == "none" for stage in as_plan(plan).stages):
        return ()
    if report.peak_bytes < none_report.peak_bytes:
        return ()
    message = (
        f"plan {str(plan)!r} saves no memory: its peak is {iec(report.peak_bytes)}, that of none "
        f"is {iec(none_report.peak_bytes)}; use none, which is faster, or look for what else sets "
        "the peak (optimizer state, the loss head, a single block)"
    )
    return (Finding(code="peak-not-below-none", message=message),)
