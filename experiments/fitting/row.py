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
      config: What was compiled; with the plan that was chosen, where it was `auto`.
      target: For what.
      report: Its memory; None where it came to nothing.
      failure: Why it did.
      size: With `--max`, the largest size that fits, 0 if none does.
      budget_bytes: What the step may need, where that was given.
      host_budget_bytes: What it may have on the host, where that was given.
      auto: What the planner chose and why, where the plan was `auto`.
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
        """Why the row came to nothing, in one line; None if it did not."""
        if self.failure is None:
            return None
        return " ".join(str(self.failure).split()) or type(self.failure).__name__

    @property
    def traceback(self) -> str:
        """The traceback of the failure, with the errors that caused it."""
        return "".join(traceback.format_exception(self.failure))

    @property
    def is_refused(self) -> bool:
        """Whether the user can mend the failure; any other is a fault of the program."""
        return isinstance(self.failure, UserError)

    @property
    def infeasible(self) -> BudgetError | None:
        """The least budget and its plan, where no plan fits."""
        return self.failure if isinstance(self.failure, BudgetError) else None

    @property
    def measured(self) -> MemoryReport:
        """The memory of a row that came to something."""
        assert self.report is not None, self.error
        return self.report

    @property
    def limit_bytes(self) -> int | None:
        """What the step may need: the budget, or what the device can use; None if unknown."""
        return self.measured.usable_bytes if self.budget_bytes is None else self.budget_bytes

    @property
    def left_bytes(self) -> int | None:
        """What is left of that at the peak, negative if it does not fit; None if unknown."""
        return None if self.limit_bytes is None else self.limit_bytes - self.measured.peak_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the step fits, the device and the host; None if nobody knows."""
        if self.host_budget_bytes is not None and self.measured.host_bytes > self.host_budget_bytes:
            return False
        return None if self.left_bytes is None else self.left_bytes >= 0

    @property
    def recomputed(self) -> float | None:
        """FLOPs run again, as a share of those without remat."""
        again, flops = self.measured.recomputed_flops, self.measured.flops
        return None if again is None or flops is None else again / (flops - again)

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
        return found | {
            "peak_bytes": report.peak_bytes,
            "host_bytes": report.host_bytes,
            "usable_bytes": report.usable_bytes,
            "fits": self.fits,
            "flops": report.flops,
            "recomputed_flops": report.recomputed_flops,
            "step_seconds": report.estimated_seconds,
            "collective_bytes": report.collective_bytes,
            "collective_seconds": report.collective_seconds,
            "compile_seconds": report.compile_seconds,
            "findings": list(report.findings),
            "understood": dataclasses.asdict(report.understood),
            "source": report.source,
            "jax_version": report.jax_version,
        }
