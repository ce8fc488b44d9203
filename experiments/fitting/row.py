"""One row of `experiments.fit`: a plan on a target, measured or chosen. No JAX import."""

import dataclasses
import traceback
from typing import Any

from experiments.config import TrainConfig
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.planner.result import BudgetError, FitResult
from jaxckpt.plans.errors import UserError
from jaxckpt.units import iec


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitRow:
    """One plan on one target.

    Attributes:
      config: What was compiled; if its plan was `auto`, with the chosen plan.
      target: The chip that it was compiled for.
      report: Its memory; None after a failure.
      failure: The error of a row without a report.
      size: With `--max`, the largest size that fits, 0 if none does.
      budget_bytes: The budget of the device, if one was given.
      host_budget_bytes: The budget of the host, if one was given.
      auto: The planner's answer, if the plan was `auto`.
    """

    config: TrainConfig
    target: str
    report: MemoryReport | None = None
    failure: Exception | None = None
    size: int | None = None
    budget_bytes: int | None = None
    host_budget_bytes: int | None = None
    auto: FitResult | None = None

    @property
    def error(self) -> str | None:
        """The failure in one line; None without a failure."""
        if self.failure is None:
            return None
        return " ".join(str(self.failure).split()) or type(self.failure).__name__

    @property
    def traceback(self) -> str:
        """The traceback of the failure, with the errors that caused it."""
        return "".join(traceback.format_exception(self.failure))

    @property
    def is_refused(self) -> bool:
        """Whether the user can mend the failure; if not, the program has a fault."""
        return isinstance(self.failure, UserError)

    @property
    def infeasible(self) -> BudgetError | None:
        """The error with the least budget and its plan, if no plan fits."""
        return self.failure if isinstance(self.failure, BudgetError) else None

    @property
    def measured(self) -> MemoryReport:
        """The memory of a row without a failure."""
        assert self.report is not None, self.error
        return self.report

    @property
    def limit_bytes(self) -> int | None:
        """The step's most bytes: the budget, or what the device can use; None if unknown."""
        return self.measured.usable_bytes if self.budget_bytes is None else self.budget_bytes

    @property
    def left_bytes(self) -> int | None:
        """The bytes that the peak leaves of the limit, negative above it; None if unknown."""
        return None if self.limit_bytes is None else self.limit_bytes - self.measured.peak_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the step fits the device and the host; None if the limit is unknown."""
        if self.host_budget_bytes is not None and self.measured.host_bytes > self.host_budget_bytes:
            return False
        return None if self.left_bytes is None else self.left_bytes >= 0

    @property
    def summary(self) -> str:
        """The row in one line."""
        name = f"{self.config.remat} on {self.target}"
        if self.error is not None:
            return f"{name}: {self.error}"
        size = "" if self.size is None else f"largest {self.size}, "
        verdict = {None: "", True: ", fits", False: ", too large"}[self.fits]
        return f"{name}: {size}{iec(self.measured.peak_bytes)}{verdict}"

    def as_json(self) -> dict[str, Any]:
        """Returns the row as JSON values."""
        found: dict[str, Any] = {"plan": self.config.remat, "target": self.target}
        found |= {"batch_size": self.config.batch_size, "seq_len": self.config.seq_len}
        found |= {"mlp_tiles": self.config.model.mlp_tiles}
        found |= {"update_in_backward": self.config.update_in_backward}
        if self.size is not None:
            found["largest"] = self.size
        if self.budget_bytes is not None:
            found["budget_bytes"] = self.budget_bytes
        if self.host_budget_bytes is not None:
            found["host_budget_bytes"] = self.host_budget_bytes
        if self.infeasible is not None:
            least = self.infeasible
            found |= {"least_bytes": least.least_bytes, "least_plan": str(least.plan)}
            found["parts"] = {name: int(size) for name, size in least.parts.items()}
        if self.report is None:
            return found | {"error": self.error, "traceback": self.traceback}
        report = self.report
        if self.auto is not None:
            chosen = self.auto.as_json()
            del chosen["report"]  # the row has it
            found["auto"] = chosen
        names = ("peak_bytes", "host_bytes", "usable_bytes", "flops", "recomputed_flops")
        names += ("collective_bytes", "collective_seconds", "compile_seconds", "source")
        found |= {name: getattr(report, name) for name in (*names, "jax_version")}
        found |= {"fits": self.fits, "step_seconds": report.estimated_seconds}
        return found | {
            "findings": list(report.findings),
            "understood": dataclasses.asdict(report.understood),
        }
