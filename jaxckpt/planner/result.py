"""The planner's answer: `FitResult`, or `BudgetError` with the least budget that works."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

from jaxckpt.compiled.report import MemoryReport
from jaxckpt.plans import Plan
from jaxckpt.plans.errors import UserError
from jaxckpt.plans.plan_set import PlanSet, plan_json, plan_of_json
from jaxckpt.units import iec

_SHOWN = 3
_LONGEST = 60  # letters of a plan in the table of candidates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One rung of the planner's ladder, as a user sees it.

    Attributes:
      plan: The plan, or plans by name.
      predicted_bytes: The step's peak by the planner's model.
      compiled_bytes: The step's peak by the compiler; None if it was not compiled.
      seconds: The step's seconds by the target's roofline.
      flops: The step's FLOPs of matrix products and attention kernels.
      host_bytes: The bytes kept on the host, by the model.
    """

    plan: Plan | PlanSet
    predicted_bytes: int
    compiled_bytes: int | None
    seconds: float
    flops: int
    host_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """Returns the candidate as JSON values."""
        return dataclasses.asdict(self) | {"plan": plan_json(self.plan)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Returns the candidate of the values that `as_json` returned."""
        plan: Any = plan_of_json(values["plan"])
        return cls(**(values | {"plan": plan}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compilation:
    """One compilation of a search, at its beginning or at its end.

    Attributes:
      number: The number of the compilation, from 1.
      most: The most compilations that the search may take.
      plan: The compiled plan, as text.
      budget_bytes: The budget.
      peak_bytes: The compiled peak; None while the compiler runs.
      seconds: The seconds that the compilation took; 0 while it runs.
      running: The numbers and plans of all compilations that run now.
      most_left: The most seconds that the search may still take, by those so far; None before the
        first compilation has ended.
    """

    number: int
    most: int
    plan: str
    budget_bytes: int
    peak_bytes: int | None = None
    seconds: float = 0.0
    running: Sequence[tuple[int, str]] = ()
    most_left: float | None = None

    @property
    def is_done(self) -> bool:
        """Whether the compiler has ended."""
        return self.peak_bytes is not None

    @property
    def live(self) -> str:
        """What is compiled now and the time left, as text; empty between two compilations."""
        if not self.running:
            return ""
        numbers, plans = zip(*self.running, strict=True)
        left = "" if self.most_left is None else f"; at most {math.ceil(self.most_left)} s left"
        return (
            f"compiling {' and '.join(map(str, numbers))} of at most {self.most}: "
            f"{', '.join(map(_shortened, plans))}{left}"
        )

    def __str__(self) -> str:
        if self.peak_bytes is None:
            return self.live
        verdict = "fits" if self.peak_bytes <= self.budget_bytes else "too large"
        return (
            f"{self.number} of at most {self.most}: {_shortened(self.plan)} "
            f"{iec(self.peak_bytes)}, {verdict}, {self.seconds:.1f} s"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """The fastest plan found whose compiled peak is within a budget; `print` shows it.

    Attributes:
      plan: The plan; `str(plan)` is what `remat=` takes. For several stacks, a mapping from names
        to plans.
      report: The memory report of the plan's compiled step.
      budget_bytes: The budget per device.
      candidates: The ladder: plans from the fastest to the plan with the least peak.
      chosen: The plan's entry in `candidates`.
      keeps: For each stage of the plan, a text of what it keeps, on the device and on the host.
      why: Why no faster plan was taken.
      num_compiles: The number of compiled steps.
      host_budget_bytes: The host's budget per device; 0 if none was given.
      clock: Where the seconds come from: the roofline, or a timed block.
      offload: Whether values may be moved to the host on the target, and why, as text; empty if no
        host budget was given.
      left_out: Plans under which the step does not run, each with its error, as text.
      notes: What the figures do not know, as text.
    """

    plan: Plan | PlanSet
    report: MemoryReport
    budget_bytes: int
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    keeps: tuple[str, ...]
    why: str
    num_compiles: int
    host_budget_bytes: int = 0
    clock: str = "the roofline"
    offload: str = ""
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def table(self) -> tuple[Candidate, ...]:
        """The candidates."""
        return self.candidates

    def as_json(self) -> dict[str, Any]:
        """Returns the result as JSON values, from which `from_json` makes an equal one."""
        return {
            "plan": plan_json(self.plan),
            "report": self.report.as_json(),
            "budget_bytes": self.budget_bytes,
            "candidates": [one.as_json() for one in self.candidates],
            "chosen": self.candidates.index(self.chosen),
            "keeps": list(self.keeps),
            "why": self.why,
            "num_compiles": self.num_compiles,
            "host_budget_bytes": self.host_budget_bytes,
            "clock": self.clock,
            "offload": self.offload,
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Returns the result of the values that `as_json` returned.

        Raises:
          KeyError, TypeError, PlanError: The values are of something else.
        """
        candidates = tuple(map(Candidate.from_json, values["candidates"]))
        made = {
            "plan": plan_of_json(values["plan"]),
            "report": MemoryReport.from_json(values["report"]),
            "candidates": candidates,
            "chosen": candidates[values["chosen"]],
            "keeps": tuple(values["keeps"]),
            "left_out": tuple(values["left_out"]),
            "notes": tuple(values["notes"]),
        }
        return cls(**(values | made))

    @property
    def summary(self) -> str:
        """The decision and its reasons as text, without the candidates."""
        one, report = self.chosen, self.report
        left = self.budget_bytes - report.peak_bytes
        off = (one.predicted_bytes - report.peak_bytes) / report.peak_bytes
        lines = [
            *_asked(self.plan).splitlines(),
            f"  budget     {iec(self.budget_bytes)} on {report.target}",
            f"  peak       {iec(report.peak_bytes)} compiled, {iec(left)} left; "
            f"{iec(one.predicted_bytes)} predicted ({off:+.1%})",
            f"  time       {seconds_text(one.seconds)} a step by {self.clock}, "
            f"{one.flops:.3e} matmul FLOPs",
            *(f"  keeps      {text}" for text in self.keeps),
            *self._of_host(),
            f"  why        {self.why}",
            *(f"  left out   {text}" for text in self.left_out),
            *(f"  note       {text}" for text in self.notes),
        ]
        lines += [] if report.understood.is_all else [f"  read       {report.understood}"]
        return "\n".join(lines)

    def _of_host(self) -> list[str]:
        """Returns lines on the host's memory; none if no host budget was given."""
        if not self.offload:
            return []
        host = f"{iec(self.report.host_bytes)} compiled of {iec(self.host_budget_bytes)}"
        return [f"  host       {host}", f"  offload    {self.offload}"]

    def __str__(self) -> str:
        return "\n".join([self.summary, *self._rows()])

    def _rows(self) -> list[str]:
        place = self.candidates.index(self.chosen)
        shown = self.candidates[max(0, place - _SHOWN) : place + _SHOWN + 1]
        lines = ["  nearest candidates, fastest first:"]
        for one in shown:
            compiled = "not compiled" if one.compiled_bytes is None else iec(one.compiled_bytes)
            mark = ">" if one is self.chosen else " "
            lines.append(
                f"  {mark} {seconds_text(one.seconds):>10}  {iec(one.predicted_bytes):>11} "
                f"predicted  {compiled:>12}  {_short(one.plan)}"
            )
        return lines


class BudgetError(UserError, ValueError):
    """No plan fits a budget: one line with the least budget, its plan and what sets it.

    Attributes:
      budget_bytes: The budget that was given.
      least_bytes: The least compiled peak that was found: a budget that works.
      plan: The plan with this peak.
      parts: The parts of this peak, in bytes by name.
      report: The memory report of the plan's compiled step.
      offload: Whether values may be moved to the host on the target, and why, as text; empty if no
        host budget was given.
    """

    def __init__(
        self,
        *,
        budget_bytes: int,
        plan: Plan | PlanSet,
        report: MemoryReport,
        parts: dict,
        offload: str = "",
    ):
        self.offload = offload
        self.budget_bytes = budget_bytes
        self.least_bytes = report.peak_bytes
        self.plan = plan
        self.report = report
        self.parts = dict(parts)
        shares = ", ".join(f"{iec(int(size))} {name}" for name, size in parts.items())
        super().__init__(
            f"no plan fits {iec(budget_bytes)} ({budget_bytes} bytes) on {report.target}; the "
            f"least budget is {iec(self.least_bytes)} ({self.least_bytes} bytes), with "
            f"{'; '.join(_asked(plan).splitlines())}: {shares}{_largest(report)}"
            + (f"; offload: {offload}" if offload else "")
        )

    def with_offload(self, text: str) -> Self:
        """Returns the error with a text on whether values may be moved to the host."""
        return type(self).from_json(self.as_json() | {"offload": text})

    def as_json(self) -> dict[str, Any]:
        """Returns the error as JSON values, from which `from_json` makes one of the same text."""
        return {
            "budget_bytes": self.budget_bytes,
            "plan": plan_json(self.plan),
            "report": self.report.as_json(),
            "parts": {name: int(size) for name, size in self.parts.items()},
            "offload": self.offload,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Returns the error of the values that `as_json` returned.

        Raises:
          KeyError, TypeError, PlanError: The values are of something else.
        """
        plan, report = plan_of_json(values["plan"]), MemoryReport.from_json(values["report"])
        return cls(**(values | {"plan": plan, "report": report}))


def _asked(plan: Plan | PlanSet) -> str:
    """Returns a plan as an option of a command line; plans by name, one a line."""
    if isinstance(plan, PlanSet):
        return "\n".join(f"{name}: {one}" for name, one in plan.items())
    return f"--remat={plan}"


def _short(plan: Plan | PlanSet) -> str:
    """Returns a plan for a table; a graph's plan is shown by its beginning."""
    return str(plan) if isinstance(plan, PlanSet) else _shortened(str(plan))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _largest(report: MemoryReport) -> str:
    """Returns a text on the largest buffer at the peak; empty if the compiler does not name it."""
    if not report.buffers:
        return ""
    one = report.buffers[0]
    where = "/".join(one.operation.split("/")[-3:])
    return f"; the largest buffer there is {iec(one.size_bytes)}, {one.shape} of {where}"


def seconds_text(seconds: float) -> str:
    """Returns seconds as text with a unit of fitting size."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
