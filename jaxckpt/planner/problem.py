"""A step as the planner's problem: traced, its kinds costed, its anchors compiled.

A problem is independent of the budget. `Problem.ladder` returns the plans worth compiling, and
`Problem.peak` compiles one plan. `result` and `infeasible` make the answer for a budget.

Each stack that is given by name is a part with its own plan. All parts share the budget and the
host's memory:

    jaxckpt.fit(step_for, num_blocks={"encoder": 12, "decoder": 24}, budget="15GiB")

One plan for all stacks is a single part without a name.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxckpt.compiled.report import MemoryReport
from jaxckpt.costs.flat import Step, where
from jaxckpt.costs.flops import count_flops
from jaxckpt.costs.roofline import Rates, estimate
from jaxckpt.planner.across_blocks import Draft, run_of
from jaxckpt.planner.across_stacks import Part, join, joints
from jaxckpt.planner.calibrate import Calibration, calibrate
from jaxckpt.planner.peak_model import (
    Spread,
    all_keeping,
    all_under,
    as_compiled,
    functions_as_compiled,
)
from jaxckpt.planner.result import BudgetError, Candidate, FitResult, Row
from jaxckpt.planner.search import ladder
from jaxckpt.planner.stacks import Stack
from jaxckpt.planner.steps import Steps, everywhere, find_stacks
from jaxckpt.plans import Plan, Stage
from jaxckpt.plans.plan_set import PlanSet
from jaxckpt.targets.links import HostLink
from jaxckpt.transforms import jaxprs

_LOG = logging.getLogger(__name__)
_LEAST_FOR_STAGES = 4  # with fewer blocks, two stages are hardly ever worth it
_SHOWN_SHARE = 0.01  # arguments below this share of all bytes are not named one by one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A step with everything that the planner knows of it before a budget is given.

    Attributes:
      steps: Returns, traces and compiles the step of a plan.
      parts: The parts, in the order in which their stacks run.
      offset_bytes: The bytes of the peak without the bytes that the stacks hold.
      stages_bytes: Bytes added to the peak of a plan of several stages; may be negative.
      seconds: The seconds of the step without its stacks.
      flops: The FLOPs of the step without its stacks.
      runs: How often a step runs its stacks: once for each microbatch.
      host_bytes: The most bytes that a plan may keep on the host.
      link: A device's link to the host.
    """

    steps: Steps
    parts: tuple[Part, ...]
    offset_bytes: float
    stages_bytes: float = 0.0
    seconds: float
    flops: int
    runs: int
    host_bytes: int
    link: HostLink

    @classmethod
    def of(
        cls,
        steps: Steps,
        num_blocks: int | Mapping[str, int] | None,
        rates: Rates,
        block=None,
        *,
        host_bytes: int = 0,
        timed: bool = False,
    ) -> "Problem":
        """Traces the step, costs its kinds and compiles its anchors.

        Args:
          steps: Returns, traces and compiles the step of a plan.
          num_blocks: The number of blocks of each stack, L, or a mapping from names to numbers;
            None if tracing finds the number.
          rates: The rates of all devices together.
          block: `(block, params_i, carry, *consts)`, or a mapping from names to such tuples; None
            if tracing finds the stacks.
          host_bytes: The most bytes that a plan may keep on the host.
          timed: Whether blocks are timed on this process's device.
        """
        steps = steps.apart()  # an answer must not depend on what was compiled before
        full, none = (everywhere(num_blocks, plan) for plan in ("full", "none"))
        stacks = find_stacks(steps, num_blocks, block)
        clocks = {name: calibrate(found) for name, found in stacks.items()} if timed else {}
        for clock in clocks.values():  # every clock has timed the same link
            rates = clock.link(rates)
        staged = _staged(stacks)
        with steps.compiling([full, none, *([] if staged is None else [staged])]):
            parts = [Part.of(name, found, rates, host_bytes) for name, found in stacks.items()]
        traced = {plan: all_under(parts, plan) for plan in ("full", "none")}
        again = traced["full"].flops - traced["none"].flops
        step_flops = [count_flops(steps.trace(plan).jaxpr) for plan in (full, none)]
        runs = runs_of(step_flops[0] - step_flops[1], again)
        ends = steps.report(full), steps.report(none)
        reports = (*ends, _keeping(steps, parts) if ends[0].num_devices > 1 else None)
        more_bytes = traced["none"].worst_bytes - traced["full"].worst_bytes
        spread = Spread.of(parts, more_bytes, runs * again, *reports)
        parts = [_on_one(part, spread, clocks.get(part.name), rates) for part in parts]
        seconds = estimate(steps.trace(full).jaxpr, rates).seconds
        problem = cls(
            steps=steps,
            parts=tuple(parts),
            offset_bytes=0.0,
            seconds=max(seconds - runs * traced["full"].seconds, 0.0) + spread.sent_seconds,
            flops=step_flops[0] - round(runs * traced["full"].flops),
            runs=runs,
            host_bytes=host_bytes,
            link=link_of(rates, 1 if timed else steps.num_devices(full)),
        )
        if len(parts) > 1:
            return problem._as_compiled(*reports)
        if not parts[0].is_stack and not stacks[parts[0].name][0].ends:
            return problem._of_functions(*ends)
        # A plan of several stages shows whether equal stacks begin together: under the right
        # assumption, `stages_bytes` is close to 0.
        together = (False, True) if parts[0].turns > 1 else (False,)
        made = (
            dataclasses.replace(
                problem, parts=(dataclasses.replace(parts[0], begins_together=one),)
            )
            for one in together
        )
        compiled = [one._as_compiled(*reports)._with_stages(staged) for one in made]
        return min(compiled, key=lambda one: abs(one.stages_bytes))

    def _as_compiled(
        self, full: MemoryReport, none: MemoryReport, keeping: MemoryReport | None
    ) -> "Problem":
        """Returns the problem fitted to the peaks of its anchors."""
        offset = full.peak_bytes - all_under(self.parts, "full").worst_bytes
        is_spread = full.num_devices > 1
        parts = as_compiled(self.parts, none.peak_bytes - offset, is_spread=is_spread)
        if keeping is not None:
            rest = keeping.peak_bytes - offset - all_keeping(parts).worst_bytes
            parts = tuple(part.holding(rest) for part in parts)
        parts = tuple(part.with_graphs() for part in parts)
        return dataclasses.replace(self, parts=parts, offset_bytes=offset)

    def _of_functions(self, full: MemoryReport, none: MemoryReport) -> "Problem":
        """Returns the problem of functions under one plan, fitted to the peaks of two plans.

        Args:
          full: The report of the step under `full`.
          none: The report of the step under `none`.
        """
        (part,) = self.parts
        part, offset = functions_as_compiled(part, full, none)
        return dataclasses.replace(self, parts=(part,), offset_bytes=offset)

    def _with_stages(self, plan: Plan | PlanSet | None) -> "Problem":
        """Returns the problem, also fitted to the peak of a plan of several stages unless None."""
        if plan is None:
            return self
        (part,) = self.parts
        stages = plan[part.name].stages if isinstance(plan, PlanSet) else plan.stages
        runs = (run_of(part.kind(stage.schedule), stage.bound_count) for stage in stages)
        predicted = self.offset_bytes + part.draft(*runs).worst_bytes
        return dataclasses.replace(self, stages_bytes=self.peak(plan) - predicted)

    def apart(self, plans: Iterable[Any]) -> "Problem":
        """Returns the problem in which only the given plans count as compiled."""
        return dataclasses.replace(self, steps=self.steps.apart(plans))

    def peak(self, plan: Any) -> int:
        """Returns the compiled peak of a plan."""
        return self.steps.report(plan).peak_bytes

    def ladder(self) -> tuple[Draft, ...]:
        """Returns the plans worth compiling, fastest first."""
        plain = itertools.product(*(part.plain_drafts() for part in self.parts))
        return ladder(
            map(self._of_step, self._drafts()),
            [self._of_step(join(self.parts, chosen)) for chosen in plain],
        )

    def least(self) -> Draft | None:
        """Returns the draft of the compiled plan with the least peak; None if no draft matches."""
        plan, _ = self._least()
        plans = plan if isinstance(plan, PlanSet) else {"": plan}
        chosen = []
        for part, own in zip(self.parts, self._own_drafts(), strict=True):
            chosen.append(next((one for one in own if one.plan == plans[part.name]), None))
        return None if None in chosen else self._of_step(join(self.parts, chosen))

    def _least(self) -> tuple[Any, MemoryReport]:
        return min(self.steps.compiled.items(), key=lambda item: item[1].peak_bytes)

    def _own_drafts(self) -> list[Iterator[Draft]]:
        link = self.link if self.host_bytes else None
        return [part.drafts(link) for part in self.parts]

    def _drafts(self) -> Iterable[Draft]:
        """Returns the joint drafts of all parts that keep at most `host_bytes` on the host."""
        own = self._own_drafts()
        if len(own) == 1:
            return (join(self.parts, [one]) for one in own[0] if one.host_bytes <= self.host_bytes)
        names, params = zip(*((part.name, part.params_bytes) for part in self.parts), strict=True)
        return joints(names, list(map(list, own)), params, self.host_bytes)

    def _of_step(self, one: Draft) -> Draft:
        """Returns a draft of the stacks, changed to the figures of the whole step."""
        extra = self.stages_bytes if one.is_mixed else 0.0
        return dataclasses.replace(
            one,
            predicted_bytes=int(self.offset_bytes + one.worst_bytes + extra),
            seconds=self.seconds + self.runs * one.seconds,
            flops=self.flops + round(self.runs * one.flops),
        )

    def candidate(self, rung: Draft) -> Candidate:
        """Returns the candidate of a rung, which a user sees."""
        report = self.steps.compiled.get(rung.plan)
        return Candidate(
            plan=rung.plan,
            predicted_bytes=rung.predicted_bytes,
            compiled_bytes=None if report is None else report.peak_bytes,
            seconds=rung.seconds,
            flops=int(rung.flops),
            host_bytes=round(rung.host_bytes),
        )

    def result(self, rungs: Sequence[Draft], place: int, budget: int) -> FitResult:
        """Returns the result for a budget.

        Args:
          rungs: The ladder.
          place: The place of the rung of the chosen plan.
          budget: The budget in bytes.
        """
        candidates = tuple(map(self.candidate, rungs))
        chosen = candidates[place]
        own = rungs[place].by_name or (("", rungs[place]),)
        return FitResult(
            plan=chosen.plan,
            report=self.steps.report(chosen.plan),
            budget_bytes=budget,
            candidates=candidates,
            chosen=chosen,
            rows=tuple(
                dataclasses.replace(row, name=name)
                for part, (name, one) in zip(self.parts, own, strict=True)
                for row in one.rows or [row_of(stage, part) for stage in one.stages]
            ),
            num_compiles=len(self.steps.compiled),
            notes=tuple(notes(self.steps.trace(chosen.plan).jaxpr)),
        )

    def infeasible(self, budget: int) -> BudgetError:
        """Returns the error for a budget that no plan fits."""
        plan, report = self._least()
        largest = max(part.kind("none").kept_bytes for part in self.parts)
        parts = peak_parts(self.steps.step(plan).args, report, largest)
        return BudgetError(budget_bytes=budget, plan=plan, report=report, parts=parts)


def _keeping(steps: Steps, parts: Sequence[Part]) -> MemoryReport | None:
    """Returns the report of the plan whose policies keep most; None if the step does not run."""
    plan = all_keeping(parts).plan
    try:
        return steps.report(plan)
    except Exception:  # the user's step and the compiler may raise anything
        _LOG.debug("%s does not run", plan, exc_info=True)
        return None


def _staged(stacks: Mapping[str, Sequence[Stack]]) -> Plan | PlanSet | None:
    """Returns the plan that shows the cost of several stages; None if it is not worth compiling.

    Args:
      stacks: The stacks that follow each plan, by name.
    """
    name, *others = stacks
    count, turns = stacks[name][0].num_blocks, len(stacks[name])
    if others or stacks[name][0].region is not None:
        return None
    if count < (_LEAST_FOR_STAGES if turns == 1 else 2):
        return None
    plan = Plan.parse(f"{count // 2}xfull/{count - count // 2}xnone")
    return PlanSet({name: plan}) if name else plan


def _on_one(part: Part, spread: Spread, clock: Calibration | None, rates: Rates) -> Part:
    """Returns a part with the figures of one device, and with measured seconds if timed."""
    none, full, forward, traced = part.kind("none"), part.kind("full"), part.forward, part
    part = part.changed(lambda kind: spread.kind(kind, none, full))
    if clock is not None:
        known: dict[str, Any] = {"none": part.kind("none"), "forward": forward, "rates": rates}
        part = part.changed(lambda kind: clock.kind(kind, **known))
        forward = clock.forward(forward)
    kept, own = traced.kind("none").kept_bytes, part.kind("none").kept_bytes
    share = own / kept if kept else 1.0
    return dataclasses.replace(part, forward=spread.forward(forward), share=share)


def notes(jaxpr) -> Iterator[str]:
    """Yields a text for each `while` loop of a step, whose number of trips is not known."""
    loops = filter(jaxprs.is_unknown, jaxprs.equations(jaxpr))
    lines = dict.fromkeys(where(Step(equation=loop, inputs=())) for loop in loops)
    for line in lines:
        place = f" at {line}" if line else ""
        yield f"the while loop{place} counts as one trip: nobody knows how often it runs"


def link_of(rates: Rates, num_devices: int) -> HostLink:
    """Returns a device's link to the host.

    Args:
      rates: The rates of all devices together; a measured link already is the link of one device.
      num_devices: The number of devices that share the link.
    """
    share = rates.host_bytes_per_second / num_devices
    return dataclasses.replace(rates.host_link, bytes_per_second=share)


def runs_of(step_flops: int, stack_flops: float) -> int:
    """Returns how often a step runs its stacks.

    Args:
      step_flops: The FLOPs that `full` adds to the step.
      stack_flops: The FLOPs that `full` adds to one run of the stacks.
    """
    return max(1, round(step_flops / stack_flops)) if stack_flops > 0 else 1


def row_of(stage: Stage, part: Part) -> Row:
    """Returns the bytes and the recomputation of a stage.

    Args:
      stage: A bound stage.
      part: The part whose blocks the stage is for.
    """
    count, none = stage.bound_count, part.kind("none")
    about: dict[str, Any] = {"stage": str(stage), "seconds": count * part.forward.seconds}
    about["none_bytes"] = int(count * none.kept_bytes)
    same = (k for k in part.kinds if k.policies == stage.policies and k.schedule == stage.schedule)
    kind = next(same, None)
    if kind is None:
        return Row(**about)
    return Row(
        **about,
        kept_bytes=int(count * kind.kept_bytes),
        host_bytes=int(count * kind.host_bytes),
        held_bytes=int(kind.live_bytes),
        again_seconds=count * max(kind.seconds - none.seconds, 0.0),
    )


def peak_parts(args: Sequence, report: MemoryReport, residual_bytes: float) -> dict[str, int]:
    """Returns the parts of a peak: a mapping from names to bytes.

    Args:
      args: The step's arguments.
      report: The memory report of the step.
      residual_bytes: The bytes that one block keeps without remat.
    """
    parts = argument_parts(args, report.argument_bytes)
    body = report.peak_bytes - report.argument_bytes
    residual_bytes = round(residual_bytes)
    block, rest = "one block's residuals", "gradients, head, carries and working memory"
    if residual_bytes < body:
        return parts | {block: residual_bytes, rest: body - residual_bytes}
    # The compiler holds less at once than JAX would keep, so the two parts cannot be separated.
    return parts | {f"{block}, {rest}": body}


def argument_parts(args: Sequence, argument_bytes: int) -> dict[str, int]:
    """Returns the bytes of a step's arguments by name, such as `arguments[0].params`.

    Small arguments form one entry. The sizes may exceed the compiled size, because arguments are
    spread over devices or never read. Then all arguments form one entry.

    Args:
      args: The step's arguments.
      argument_bytes: The compiled size of all arguments.
    """
    parts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(args)):
        name = "arguments" + jax.tree_util.keystr(path[:2])
        if hasattr(leaf, "dtype"):  # other leaves are static arguments
            parts[name] = parts.get(name, 0) + leaf.size * leaf.dtype.itemsize
    large = {name: size for name, size in parts.items() if size > _SHOWN_SHARE * argument_bytes}
    rest = argument_bytes - sum(large.values())
    if rest < 0 or not large:
        return {"arguments (weights, optimizer, batch)": argument_bytes}
    return large | ({"other arguments": rest} if rest else {})
