"""A step of several stacks as the planner's problem: each has a plan of its own, all one budget.

    jaxckpt.fit(step_for, num_blocks={"encoder": 12, "decoder": 24}, budget="15GiB")

`step_for` gets the plans by name; `named_stacks.py` finds which stack follows which. `full`
everywhere and `none` everywhere are compiled: the one tells what the step needs beside its stacks,
the other how much of what JAX keeps XLA really keeps, one share for all stacks. What the host may
hold is shared as the budget is.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxckpt.memory.flops import count_flops
from jaxckpt.memory.host_link import HostLink
from jaxckpt.memory.report import MemoryReport
from jaxckpt.memory.roofline import Rates, estimate
from jaxckpt.planner.calibrate import Calibration, calibrate
from jaxckpt.planner.costs import Forward, Kind, forward_cost
from jaxckpt.planner.drafts import Draft, draft, drafts
from jaxckpt.planner.joint import Joint, joints
from jaxckpt.planner.kinds import find_kinds
from jaxckpt.planner.ladder import Rung, ladder
from jaxckpt.planner.named_stacks import named_stacks
from jaxckpt.planner.pieces import run_of
from jaxckpt.planner.problem import NO_LIMIT, keeps_text, link_of, peak_parts, runs_of, why
from jaxckpt.planner.result import BudgetError, Candidate, FitResult
from jaxckpt.planner.spread import Spread
from jaxckpt.planner.stacks import Stack
from jaxckpt.planner.steps import Steps
from jaxckpt.plans.plan_set import PlanSet

_BISECTIONS = 50
_MOST_SHARE = 4.0  # of what JAX keeps; padding never makes more of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One named stack of a step.

    Attributes:
      name: As `step_for` knows it.
      num_blocks: L.
      kinds: Ways to treat a block that are worth mixing.
      plain: Those that a user would try first.
      forward: The cost of one more run of a block.
    """

    name: str
    num_blocks: int
    kinds: tuple[Kind, ...]
    plain: tuple[Kind, ...]
    forward: Forward

    @classmethod
    def of(
        cls,
        name: str,
        num_blocks: int,
        stacks: Sequence[Stack],
        rates: Rates,
        host_bytes: int = 0,
    ) -> "Part":
        """Costs the blocks of a name's stacks."""
        kinds, plain = find_kinds(stacks, rates, host_bytes)
        return cls(
            name=name,
            num_blocks=num_blocks,
            kinds=kinds,
            plain=plain,
            forward=forward_cost(stacks, rates),
        )

    def kind(self, schedule: str) -> Kind:
        """Returns the kind `none` or `full`."""
        return next(k for k in self.plain if not k.policies and k.schedule == schedule)

    def draft(self, kind: Kind) -> Draft:
        """Returns the plan of one kind."""
        return draft([run_of(kind, self.num_blocks)])

    def drafts(self, link: HostLink | None) -> list[Draft]:
        """Returns every plan worth a thought; without a link, those that move no carries."""
        return list(drafts(self.kinds, self.forward, self.num_blocks, link))

    def spread(self, spread: Spread) -> "Part":
        """Returns the part as one of a step's devices sees it."""
        none = self.kind("none")
        on_one = lambda kinds: tuple(spread.kind(kind, none) for kind in kinds)
        return dataclasses.replace(
            self,
            kinds=on_one(self.kinds),
            plain=on_one(self.plain),
            forward=spread.forward(self.forward),
        )

    def timed(self, clock: Calibration, rates: Rates) -> "Part":
        """Returns the part with the seconds of a block that was timed."""
        known = {"none": self.kind("none"), "forward": self.forward, "rates": rates}
        return dataclasses.replace(
            self,
            kinds=clock.kinds(self.kinds, **known),
            plain=clock.kinds(self.plain, **known),
            forward=clock.forward(self.forward),
        )

    def scaled(self, share: float) -> "Part":
        """Returns the part whose `none` keeps a share of what JAX keeps; `full` is the least."""
        none, least = self.kind("none"), self.kind("full").kept_bytes
        made = dataclasses.replace(none, kept_bytes=max(share * none.kept_bytes, least))
        swap = lambda kinds: tuple(made if kind == none else kind for kind in kinds)
        return dataclasses.replace(self, kinds=swap(self.kinds), plain=swap(self.plain))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeveralProblem:
    """A step of several stacks with everything that does not depend on the budget.

    Attributes:
      steps: Its steps, traced and compiled.
      parts: Its stacks in the order in which they run.
      offset_bytes: Beside what the stacks keep and hold.
      seconds: Of the step beside its stacks.
      flops: Of the same.
      runs: How often a step runs its stacks.
      host_bytes: What all plans together may have on the host.
      link: Of a device to the host.
    """

    steps: Steps
    parts: tuple[Part, ...]
    offset_bytes: float
    seconds: float
    flops: int
    runs: int = 1
    host_bytes: int = 0
    link: HostLink = NO_LIMIT

    @classmethod
    def of(
        cls,
        steps: Steps,
        num_blocks: Mapping[str, int],
        rates: Rates,
        blocks: Mapping[str, Sequence] | None = None,
        *,
        host_bytes: int = 0,
        timed: bool = False,
    ) -> "SeveralProblem":
        """Traces the step, costs its blocks and compiles its anchors; arguments as of `Problem`."""
        steps = steps.apart()  # what else was compiled of them is no part of this problem
        found = named_stacks(steps, num_blocks, blocks)
        clocks = {name: calibrate(stacks) for name, stacks in found.items()} if timed else {}
        for clock in clocks.values():  # each has timed the same link
            rates = clock.link(rates)
        parts = tuple(
            Part.of(name, num_blocks[name], stacks, rates, host_bytes)
            for name, stacks in found.items()
        )
        full, none = (PlanSet.same(num_blocks, plan) for plan in ("full", "none"))
        step_flops = [count_flops(steps.trace(plan).jaxpr) for plan in (full, none)]
        of_full, of_none = (_plain_joint(parts, schedule) for schedule in ("full", "none"))
        again = of_full.flops - of_none.flops
        runs = runs_of(step_flops[0] - step_flops[1], again)
        reports = [steps.report(plan) for plan in (full, none)]
        stack_seconds = of_full.seconds
        spread = Spread.of(of_none.worst_bytes - of_full.worst_bytes, runs * again, *reports)
        parts = tuple(part.spread(spread) for part in parts)
        offset = reports[0].peak_bytes - _plain_joint(parts, "full").worst_bytes
        seconds = estimate(steps.trace(full).jaxpr, rates).seconds
        parts = tuple(
            part.timed(clocks[part.name], rates) if clocks else part
            for part in _calibrated(parts, reports[1].peak_bytes - offset)
        )
        return cls(
            steps=steps,
            parts=parts,
            offset_bytes=offset,
            seconds=max(seconds - runs * stack_seconds, 0.0) + spread.sent_seconds,
            flops=step_flops[0] - round(runs * of_full.flops),
            runs=runs,
            host_bytes=host_bytes,
            link=link_of(rates, 1 if timed else steps.num_devices(full)),
        )

    def apart(self, plans: Iterable[Any]) -> "SeveralProblem":
        """Returns the problem as it is if some plans are compiled and no others."""
        return dataclasses.replace(self, steps=self.steps.apart(plans))

    def peak(self, plan: PlanSet) -> int:
        """Returns the compiled peak of a plan for each stack."""
        return self.steps.report(plan).peak_bytes

    def ladder(self) -> tuple[Rung, ...]:
        """Returns the plans worth compiling, fastest first."""
        plain = itertools.product(*([part.draft(k) for k in part.plain] for part in self.parts))
        found = joints(
            [part.name for part in self.parts],
            list(map(self._drafts, self.parts)),
            _params(self.parts),
            self.host_bytes,
        )
        return ladder(
            map(self._rung, found),
            [self._rung(_joint(self.parts, drafts)) for drafts in plain],
        )

    def least(self) -> Rung | None:
        """Returns the compiled plan of the least peak; None if no stack's plans have its part."""
        plans, _ = self._least()
        drafts = []
        for part in self.parts:
            found = (one for one in self._drafts(part) if one.plan == plans[part.name])
            drafts.append(next(found, None))
        return None if None in drafts else self._rung(_joint(self.parts, drafts))

    def _least(self) -> tuple[Any, MemoryReport]:
        return min(self.steps.compiled.items(), key=lambda item: item[1].peak_bytes)

    def _drafts(self, part: Part) -> list[Draft]:
        return part.drafts(self.link if self.host_bytes else None)

    def _rung(self, joint: Joint) -> Rung:
        peak = int(self.offset_bytes + joint.worst_bytes)
        seconds = self.seconds + self.runs * joint.seconds
        return Rung(draft=joint, predicted_bytes=peak, seconds=seconds)

    def candidate(self, rung: Rung) -> Candidate:
        """Returns a rung as the user sees it."""
        plan = rung.draft.plan
        report = self.steps.compiled.get(plan)
        return Candidate(
            plan=plan,
            predicted_bytes=rung.predicted_bytes,
            compiled_bytes=None if report is None else report.peak_bytes,
            seconds=rung.seconds,
            flops=self.flops + round(self.runs * rung.draft.flops),
            host_bytes=round(rung.draft.host_bytes),
        )

    def result(self, rungs: Sequence[Rung], place: int, budget: int) -> FitResult:
        """Returns the answer."""
        candidates = tuple(map(self.candidate, rungs))
        chosen = candidates[place]
        keeps = [
            f"{part.name}: {keeps_text(stage, part.kinds)}"
            for part, draft in zip(self.parts, rungs[place].draft.drafts, strict=True)
            for stage in draft.stages
        ]
        return FitResult(
            plan=chosen.plan,
            report=self.steps.report(chosen.plan),
            budget_bytes=budget,
            candidates=candidates,
            chosen=chosen,
            keeps=tuple(keeps),
            why=why(candidates[place - 1] if place else None, budget),
            num_compiles=len(self.steps.compiled),
        )

    def infeasible(self, budget: int) -> BudgetError:
        """Returns the error for a budget that no plans fit."""
        plan, report = self._least()
        args = self.steps.step(plan).args
        largest = max(part.kind("none").kept_bytes for part in self.parts)
        parts = peak_parts(args, report, largest)
        return BudgetError(budget_bytes=budget, plan=plan, report=report, parts=parts)


def _params(parts: Sequence[Part]) -> tuple[float, ...]:
    return tuple(part.num_blocks * part.kind("full").params_bytes for part in parts)


def _joint(parts: Sequence[Part], drafts: Sequence[Draft]) -> Joint:
    names = tuple(part.name for part in parts)
    return Joint(names=names, drafts=tuple(drafts), params_bytes=_params(parts))


def _plain_joint(parts: Sequence[Part], schedule: str) -> Joint:
    return _joint(parts, [part.draft(part.kind(schedule)) for part in parts])


def _calibrated(parts: Sequence[Part], worst_bytes: float) -> tuple[Part, ...]:
    """Returns the parts with `none` as it is once compiled: together they hold `worst_bytes`."""
    low, high = 0.0, _MOST_SHARE
    for _ in range(_BISECTIONS):
        share = (low + high) / 2
        scaled = [part.scaled(share) for part in parts]
        too_much = _plain_joint(scaled, "none").worst_bytes > worst_bytes
        low, high = (low, share) if too_much else (share, high)
    return tuple(part.scaled(low) for part in parts)
