"""The planner's answer: `FitResult`, or `BudgetError` with the least budget that works."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

from jaxckpt.compiled.report import MemoryReport
from jaxckpt.plans import Plan
from jaxckpt.plans.errors import UserError
from jaxckpt.plans.plan_set import PlanSet, plan_json, plan_of_json
from jaxckpt.units import in_unit

_SHOWN = 3
_LONGEST = 60  # the most letters of a plan in the table of candidates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One rung of the planner's ladder, in the form that a user sees.

    Attributes:
      plan: The plan, or plans by name.
      predicted_bytes: The step's peak by the planner's model.
      compiled_bytes: The step's peak by the compiler; None if the plan was not compiled.
      seconds: The step's seconds by the target's roofline.
      flops: The step's FLOPs of matrix products and attention kernels.
      host_bytes: The bytes kept on the host, by the planner's model.
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
        """Returns the candidate whose JSON values `as_json` returned."""
        plan: Any = plan_of_json(values["plan"])
        return cls(**(values | {"plan": plan}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A stage of the answer, with its bytes and recomputation by the planner's model.

    Attributes:
      stage: The stage as text.
      name: The name of the stage's plan; empty if one plan is for all stacks.
      kept_bytes: Bytes that the stage keeps on the device until it is reversed; None for a
        schedule, whose carries come and go.
      host_bytes: Bytes that the stage keeps on the host.
      held_bytes: Bytes that the stage's reversal holds in addition to `kept_bytes`.
      none_bytes: Bytes that the stage would keep under `none`.
      seconds: Seconds of the forward pass.
      again_seconds: Seconds of recomputation.
      lines: The lines of the stage's operations in the user's code; empty for blocks.
    """

    stage: str
    name: str = ""
    kept_bytes: int | None = None
    host_bytes: int = 0
    held_bytes: int = 0
    none_bytes: int = 0
    seconds: float = 0.0
    again_seconds: float = 0.0
    lines: str = ""

    def text(self, unit: str = "") -> str:
        """Returns the row as one line of text.

        Args:
          unit: The unit of bytes; empty for a unit that fits the size.
        """
        head = f"{self.name}: {self.stage}" if self.name else self.stage
        if self.kept_bytes is None:
            is_moved = Plan.parse(self.stage).stages[0].offloads_carry
            where = "slots on the host" if is_moved else "slots"
            return f"{head}: carries in {where}, a segment's residuals in turn"
        parts = [f"{in_unit(self.kept_bytes, unit)} on the device"]
        if self.host_bytes:
            parts.append(f"{in_unit(self.host_bytes, unit)} on the host")
        if self.again_seconds > 0:
            parts.append(f"{seconds_text(self.again_seconds)} again")
        return f"{head}: {', '.join(parts)}" + (f"  ({self.lines})" if self.lines else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compilation:
    """One compilation of a search, at its beginning or at its end.

    Attributes:
      number: The number of the compilation, from 1.
      most: The most compilations that the search may take.
      plan: The compiled plan, as text.
      budget_bytes: The budget.
      unit: The unit in which the budget was given; empty for a unit that fits the size.
      peak_bytes: The compiled peak; None while the compiler runs.
      seconds: The seconds that the compilation took; 0 while it runs.
      running: The numbers and plans of all compilations that run now.
      most_left: An estimate of the most seconds that the search still takes, from the seconds so
        far; None before the first compilation has ended.
    """

    number: int
    most: int
    plan: str
    budget_bytes: int
    unit: str = ""
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
        """The running compilations and the time left, as text; empty between two compilations."""
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
            f"{in_unit(self.peak_bytes, self.unit)}, {verdict}, {self.seconds:.1f} s"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """The fastest plan found whose compiled peak is within a budget; `print` shows it.

    Attributes:
      plan: The plan; `remat=` takes the plan or `str(plan)`. For several stacks, a mapping from
        names to plans.
      report: The memory report of the plan's compiled step.
      budget_bytes: The budget per device.
      candidates: The ladder: plans from the fastest to the plan with the least peak.
      chosen: The plan's entry in `candidates`.
      rows: For each stage of the plan, its bytes and its recomputation.
      num_compiles: The number of compiled steps.
      host_budget_bytes: The host's budget per device; 0 if no host budget was given.
      clock: The source of the seconds: the roofline, or a timed block.
      offload: Whether values may be moved to the host on the target, with the reason as text; empty
        if no host budget was given.
      left_out: Plans under which the step fails, each with its error, as text.
      notes: Facts that the figures leave out, as text.
      unit: The unit in which the budget was given and bytes are shown; empty for a unit that fits
        the size.
    """

    plan: Plan | PlanSet
    report: MemoryReport
    budget_bytes: int
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    rows: tuple[Row, ...]
    num_compiles: int
    host_budget_bytes: int = 0
    clock: str = "the roofline"
    offload: str = ""
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unit: str = ""

    @property
    def why(self) -> str:
        """The reason why no faster plan was taken, as text."""
        place = self.candidates.index(self.chosen)
        if not place:
            return "it is the fastest plan there is"
        faster = self.candidates[place - 1]
        if faster.compiled_bytes is None:
            return (
                f"the next faster plan, {_short(faster.plan)}, is predicted to need "
                f"{in_unit(faster.predicted_bytes, self.unit)} (not compiled)"
            )
        return (
            f"the next faster plan, {_short(faster.plan)}, needs "
            f"{in_unit(faster.compiled_bytes, self.unit)} compiled, "
            f"{in_unit(faster.compiled_bytes - self.budget_bytes, self.unit)} too much"
        )

    @property
    def keeps(self) -> tuple[str, ...]:
        """For each stage of the plan, its bytes and recomputation as text."""
        return tuple(row.text(self.unit) for row in self.rows)

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
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "num_compiles": self.num_compiles,
            "host_budget_bytes": self.host_budget_bytes,
            "clock": self.clock,
            "offload": self.offload,
            "left_out": list(self.left_out),
            "notes": list(self.notes),
            "unit": self.unit,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Returns the result whose JSON values `as_json` returned.

        Args:
          values: The JSON values.

        Raises:
          KeyError, TypeError, PlanError: The values do not describe a result.
        """
        candidates = tuple(map(Candidate.from_json, values["candidates"]))
        made = {
            "plan": plan_of_json(values["plan"]),
            "report": MemoryReport.from_json(values["report"]),
            "candidates": candidates,
            "chosen": candidates[values["chosen"]],
            "rows": tuple(Row(**row) for row in values["rows"]),
            "left_out": tuple(values["left_out"]),
            "notes": tuple(values["notes"]),
        }
        return cls(**(values | made))

    @property
    def summary(self) -> str:
        """The decision and its reasons as text, without the candidates."""
        one, report = self.chosen, self.report
        size = lambda nbytes: in_unit(nbytes, self.unit)
        left = self.budget_bytes - report.peak_bytes
        off = (one.predicted_bytes - report.peak_bytes) / report.peak_bytes
        lines = [
            *_asked(self.plan).splitlines(),
            f"  budget     {size(self.budget_bytes)} on {report.target}",
            f"  peak       {size(report.peak_bytes)} compiled, {size(left)} left; "
            f"{size(one.predicted_bytes)} predicted ({off:+.1%})",
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
        """Returns lines about the host's memory; an empty list if no host budget was given."""
        if not self.offload:
            return []
        size = lambda nbytes: in_unit(nbytes, self.unit)
        host = f"{size(self.report.host_bytes)} compiled of {size(self.host_budget_bytes)}"
        return [f"  host       {host}", f"  offload    {self.offload}"]

    def __str__(self) -> str:
        return "\n".join([self.summary, *self._nearest()])

    def _nearest(self) -> list[str]:
        place = self.candidates.index(self.chosen)
        shown = self.candidates[max(0, place - _SHOWN) : place + _SHOWN + 1]
        lines = ["  nearest candidates, fastest first:"]
        for one in shown:
            size = lambda nbytes: in_unit(nbytes, self.unit)
            compiled = "not compiled" if one.compiled_bytes is None else size(one.compiled_bytes)
            mark = ">" if one is self.chosen else " "
            lines.append(
                f"  {mark} {seconds_text(one.seconds):>10}  {size(one.predicted_bytes):>11} "
                f"predicted  {compiled:>12}  {_short(one.plan)}"
            )
        return lines


class BudgetError(UserError, ValueError):
    """No plan fits a budget: one line with the least budget, its plan and the parts of its peak.

    Attributes:
      budget_bytes: The budget that was given.
      least_bytes: The least compiled peak that was found; a budget of this size works.
      plan: The plan with the least compiled peak.
      parts: The parts of the least compiled peak, in bytes by name.
      report: The memory report of the plan's compiled step.
      offload: Whether values may be moved to the host on the target, with the reason as text; empty
        if no host budget was given.
      unit: The unit in which the budget was given and bytes are shown.
    """

    def __init__(
        self,
        *,
        budget_bytes: int,
        plan: Plan | PlanSet,
        report: MemoryReport,
        parts: dict,
        offload: str = "",
        unit: str = "",
    ):
        size = lambda nbytes: in_unit(int(nbytes), unit)
        self.offload, self.unit = offload, unit
        self.budget_bytes = budget_bytes
        self.least_bytes = report.peak_bytes
        self.plan = plan
        self.report = report
        self.parts = dict(parts)
        shares = ", ".join(f"{size(nbytes)} {name}" for name, nbytes in parts.items())
        super().__init__(
            f"no plan fits {size(budget_bytes)} ({budget_bytes} bytes) on {report.target}; the "
            f"least budget is {size(self.least_bytes)} ({self.least_bytes} bytes), with "
            f"{'; '.join(_asked(plan).splitlines())}: {shares}{_largest(report, unit)}"
            + (f"; offload: {offload}" if offload else "")
        )

    def replaced(self, **changes: str) -> Self:
        """Returns a copy of the error with another `offload` or `unit`."""
        return type(self).from_json(self.as_json() | changes)

    def as_json(self) -> dict[str, Any]:
        """Returns the error as JSON values, from which `from_json` makes an error of equal text."""
        return {
            "budget_bytes": self.budget_bytes,
            "plan": plan_json(self.plan),
            "report": self.report.as_json(),
            "parts": {name: int(size) for name, size in self.parts.items()},
            "offload": self.offload,
            "unit": self.unit,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Returns the error whose JSON values `as_json` returned.

        Args:
          values: The JSON values.

        Raises:
          KeyError, TypeError, PlanError: The values do not describe such an error.
        """
        plan, report = plan_of_json(values["plan"]), MemoryReport.from_json(values["report"])
        return cls(**(values | {"plan": plan, "report": report}))


def _asked(plan: Plan | PlanSet) -> str:
    """Returns a plan as an option of a command line; plans by name have one line each."""
    if isinstance(plan, PlanSet):
        return "\n".join(f"{name}: {one}" for name, one in plan.items())
    return f"--remat={plan}"


def _short(plan: Plan | PlanSet) -> str:
    """Returns a plan as text for a table; of a long plan only the beginning."""
    return str(plan) if isinstance(plan, PlanSet) else _shortened(str(plan))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _largest(report: MemoryReport, unit: str) -> str:
    """Returns a text about the largest buffer at the peak; empty if the report has no buffers."""
    if not report.buffers:
        return ""
    one = report.buffers[0]
    where = "/".join(one.operation.split("/")[-3:])
    size = in_unit(one.size_bytes, unit)
    return f"; the largest buffer there is {size}, {one.shape} of {where}"


def seconds_text(seconds: float) -> str:
    """Returns seconds as text, in seconds, milliseconds or microseconds."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
