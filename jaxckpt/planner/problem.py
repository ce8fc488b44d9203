"""A step as the planner's problem: traced, its blocks costed, its anchors compiled.

Everything here is of a step and not of a budget: `Problem.ladder` has the plans worth compiling,
`Problem.peak` compiles one, `result` and `infeasible` put what was found into words.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from jaxckpt.memory.flops import count_flops
from jaxckpt.memory.host_link import HostLink
from jaxckpt.memory.report import MemoryReport
from jaxckpt.memory.roofline import Rates, estimate
from jaxckpt.memory.units import gib
from jaxckpt.planner.calibrate import calibrate
from jaxckpt.planner.costs import Forward, Kind, forward_cost
from jaxckpt.planner.drafts import Draft, draft, drafts
from jaxckpt.planner.kinds import find_kinds
from jaxckpt.planner.ladder import Rung, ladder
from jaxckpt.planner.peak import PeakModel
from jaxckpt.planner.pieces import run_of
from jaxckpt.planner.places import following, held_together, places
from jaxckpt.planner.result import BudgetError, Candidate, FitResult
from jaxckpt.planner.spread import Spread
from jaxckpt.planner.stacks import given_stack
from jaxckpt.planner.steps import Steps, Trace, is_same_program
from jaxckpt.plans import Plan, Stage

NO_LIMIT = HostLink(bytes_per_second=math.inf)
_NONE, _FULL = Plan.parse("none"), Plan.parse("full")
_LEAST_FOR_STAGES = 4  # blocks; fewer are hardly ever worth two stages
_SHOWN_SHARE = 0.01  # of all arguments; smaller ones are not named one by one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A step with everything that does not depend on the budget.

    Attributes:
      steps: Its steps, traced and compiled.
      num_blocks: L.
      kinds: Ways to treat a block that are worth mixing.
      plain: Those that a user would try first.
      forward: The cost of one more run of a block.
      model: Predicts peaks.
      seconds: Of the step beside its stacks.
      flops: Of the same.
      runs: How often a step runs its stacks: once for each part of an accumulated batch.
      host_bytes: What a plan may have on the host.
      link: Of a device to the host.
    """

    steps: Steps
    num_blocks: int
    kinds: tuple[Kind, ...]
    plain: tuple[Kind, ...]
    forward: Forward
    model: PeakModel
    seconds: float
    flops: int
    runs: int = 1
    host_bytes: int = 0
    link: HostLink = NO_LIMIT

    @classmethod
    def of(
        cls,
        steps: Steps,
        num_blocks: int,
        rates: Rates,
        block,
        *,
        host_bytes: int = 0,
        timed: bool = False,
    ) -> "Problem":
        """Traces the step, costs its blocks and compiles its anchors.

        Args:
          steps: Of the plans.
          num_blocks: L.
          rates: The chip's.
          block: As for `jaxckpt.fit`.
          host_bytes: What a plan may have on the host.
          timed: Whether a block is timed on this process's device.
        """
        steps = steps.apart()  # what else was compiled of them is no part of this problem
        stacks, seconds, flops = _stacks(steps, num_blocks, rates, block)
        clock = calibrate(stacks) if timed else None
        rates = rates if clock is None else clock.link(rates)
        kinds, plain = find_kinds(stacks, rates, host_bytes)
        none, full = (_kind_of(plain, plan) for plan in (_NONE, _FULL))
        again = num_blocks * (full.flops - none.flops)
        runs = runs_of(flops - count_flops(steps.trace(_NONE).jaxpr), again)
        reports = [steps.report(plan) for plan in (_FULL, _NONE)]
        peaks = [report.peak_bytes for report in reports]
        block_seconds = full.seconds
        worst = [draft([run_of(kind, num_blocks)]).worst_bytes for kind in (none, full)]
        spread = Spread.of(worst[0] - worst[1], runs * again, *reports)
        on_one = lambda found: tuple(spread.kind(kind, none) for kind in found)
        kinds, plain = on_one(kinds), on_one(plain)
        none, full = (_kind_of(plain, plan) for plan in (_NONE, _FULL))
        turns = len(stacks)
        model = PeakModel.between(full, peaks[0], none, peaks[1], num_blocks, turns)
        # From here on kinds weigh what they weigh once compiled.
        compiled = lambda found: tuple(map(model.compiled, found))
        halves = [run_of(full, num_blocks // 2)]
        if num_blocks >= _LEAST_FOR_STAGES:
            halves.append(run_of(model.none, num_blocks - num_blocks // 2))
            mixed = draft(halves)
            model = model.with_stages(mixed, steps.report(mixed.plan).peak_bytes)
        forward = forward_cost(stacks, rates)
        if clock is not None:
            known = {"none": none, "forward": forward, "rates": rates}
            kinds, plain = (clock.kinds(found, **known) for found in (kinds, plain))
            forward = clock.forward(forward)
        return cls(
            steps=steps,
            num_blocks=num_blocks,
            kinds=compiled(kinds),
            plain=compiled(plain),
            forward=spread.forward(forward),
            model=model,
            seconds=max(seconds - runs * num_blocks * block_seconds, 0.0) + spread.sent_seconds,
            flops=flops - round(runs * num_blocks * full.flops),
            runs=runs,
            host_bytes=host_bytes,
            link=link_of(rates, 1 if timed else steps.num_devices(_FULL)),
        )

    def apart(self, plans: Iterable[Any]) -> "Problem":
        """Returns the problem as it is if some plans are compiled and no others."""
        return dataclasses.replace(self, steps=self.steps.apart(plans))

    def peak(self, plan: Plan) -> int:
        """Returns the compiled peak of a plan."""
        return self.steps.report(plan).peak_bytes

    def ladder(self) -> tuple[Rung, ...]:
        """Returns the plans worth compiling, fastest first."""
        found = [self._rung(one) for one in self._drafts()]
        plain = [draft([run_of(kind, self.num_blocks)]) for kind in self.plain]
        return ladder(found, [self._rung(one) for one in plain])

    def least(self) -> Rung | None:
        """Returns the compiled plan of the least peak; None if it is none of the drafts."""
        plan, _ = self._least()
        return next((self._rung(one) for one in self._drafts() if one.plan == plan), None)

    def _least(self) -> tuple[Any, MemoryReport]:
        return min(self.steps.compiled.items(), key=lambda item: item[1].peak_bytes)

    def _drafts(self) -> Iterator[Draft]:
        link = self.link if self.host_bytes else None
        found = drafts(self.kinds, self.forward, self.num_blocks, link)
        return (one for one in found if one.host_bytes <= self.host_bytes)

    def _rung(self, draft: Draft) -> Rung:
        seconds = self.seconds + self.runs * draft.seconds
        return Rung(draft=draft, predicted_bytes=self.model.predict(draft), seconds=seconds)

    def candidate(self, rung: Rung) -> Candidate:
        """Returns a rung as the user sees it."""
        report = self.steps.compiled.get(rung.draft.plan)
        return Candidate(
            plan=rung.draft.plan,
            predicted_bytes=rung.predicted_bytes,
            compiled_bytes=None if report is None else report.peak_bytes,
            seconds=rung.seconds,
            flops=self.flops + round(self.runs * rung.draft.flops),
            host_bytes=round(rung.draft.host_bytes),
        )

    def result(self, rungs: Sequence[Rung], place: int, budget: int) -> FitResult:
        """Returns the answer."""
        candidates = tuple(self.candidate(rung) for rung in rungs)
        chosen = candidates[place]
        return FitResult(
            plan=chosen.plan,
            report=self.steps.report(chosen.plan),
            budget_bytes=budget,
            candidates=candidates,
            chosen=chosen,
            keeps=tuple(keeps_text(stage, self.kinds) for stage in rungs[place].draft.stages),
            why=why(candidates[place - 1] if place else None, budget),
            num_compiles=len(self.steps.compiled),
        )

    def infeasible(self, budget: int) -> BudgetError:
        """Returns the error for a budget that no plan fits."""
        plan, report = self._least()
        none = next(kind for kind in self.plain if kind.schedule == "none")
        parts = peak_parts(self.steps.step(plan).args, report, none.kept_bytes)
        return BudgetError(budget_bytes=budget, plan=plan, report=report, parts=parts)


def _stacks(steps: Steps, num_blocks: int, rates: Rates, block):
    """Returns the stacks that follow the plan, and the seconds and FLOPs of the step under `full`.

    Raises:
      ValueError: The step does not trace, no stack follows its plan, or one that does has another
        number of blocks.
    """
    full, none = steps.trace(_FULL), steps.trace(_NONE)
    if block is None:
        found = following(full.phases, _FULL, none.phases, _NONE)
        stacks = [place.call.stack for place in held_together(full.phases, found)]
    else:
        stacks = [given_stack(block, num_blocks)]
    if not stacks or (block is not None and is_same_program(full, none)):
        raise ValueError(_ignored(full, none))
    for stack in stacks:
        if stack.num_blocks != num_blocks:
            raise ValueError(
                f"num_blocks is {num_blocks}, but the step runs a stack of {stack.num_blocks} "
                "blocks under the plan"
            )
    return stacks, estimate(full.jaxpr, rates).seconds, count_flops(full.jaxpr)


def _ignored(full: Trace, none: Trace) -> str:
    for plan, trace in ((_FULL, full), (_NONE, none)):
        others = [place.call for place in places(trace.phases) if not place.call.is_under(plan)]
        if others:
            return (
                f"step_for ignores its plan: asked for {str(plan)!r}, its stack runs under "
                f"{others[0].remat!r}; hand the plan to scan_blocks or Stack as remat="
            )
    if is_same_program(full, none):
        return "step_for ignores its plan: the program is the same under 'none' and 'full'"
    return (
        "the step runs no scan_blocks or jaxckpt Stack while it is traced; give the block as "
        "block=(block, params_i, carry, *consts)"
    )


def link_of(rates: Rates, num_devices: int) -> HostLink:
    """Returns a device's link.

    Args:
      rates: Of all devices together, but for a link that was timed: that is one device's.
      num_devices: That share the link.
    """
    share = rates.host_bytes_per_second / num_devices
    return dataclasses.replace(rates.host_link, bytes_per_second=share)


def runs_of(step_flops: int, stack_flops: float) -> int:
    """Returns how often a step runs its stacks, from what `full` adds to it and to one run."""
    return max(1, round(step_flops / stack_flops)) if stack_flops > 0 else 1


def keeps_text(stage: Stage, kinds: Sequence[Kind]) -> str:
    """Returns what a bound stage keeps where, as text."""
    same = (k for k in kinds if k.policies == stage.policies and k.schedule == stage.schedule)
    kind = next(same, None)
    if kind is None:
        slots = "slots on the host" if stage.offloads_carry else "slots"
        return f"{stage}: carries in {slots}, a segment's residuals in turn"
    host = (
        f", {gib(int(stage.bound_count * kind.host_bytes))} on the host" if kind.host_bytes else ""
    )
    return f"{stage}: {gib(int(stage.bound_count * kind.kept_bytes))} on the device{host}"


def peak_parts(args: Sequence, report: MemoryReport, residual_bytes: float) -> dict[str, int]:
    """Returns what a peak consists of, in bytes, by name.

    Args:
      args: The step's arguments.
      report: Of the step.
      residual_bytes: What one block keeps without remat.
    """
    parts = argument_parts(args, report.argument_bytes)
    body = report.peak_bytes - report.argument_bytes
    residual_bytes = round(residual_bytes)
    block, rest = "one block's residuals", "gradients, head, carries and working memory"
    if residual_bytes < body:
        return parts | {block: residual_bytes, rest: body - residual_bytes}
    # The compiler needs less at once than JAX would keep.
    return parts | {f"{block}, {rest}": body}


def argument_parts(args: Sequence, argument_bytes: int) -> dict[str, int]:
    """Returns the bytes of a step's arguments by name: `arguments[0].params`.

    Small ones are one part, and so are all where their sizes do not add up to what was compiled:
    arguments that are spread over devices, or that the step never reads.
    """
    parts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(args)):
        name = "arguments" + jax.tree_util.keystr(path[:2])
        if hasattr(leaf, "dtype"):  # others are static
            parts[name] = parts.get(name, 0) + leaf.size * leaf.dtype.itemsize
    large = {name: size for name, size in parts.items() if size > _SHOWN_SHARE * argument_bytes}
    rest = argument_bytes - sum(large.values())
    if rest < 0 or not large:
        return {"arguments (weights, optimizer, batch)": argument_bytes}
    return large | ({"other arguments": rest} if rest else {})


def _kind_of(kinds: Sequence[Kind], plan: Plan) -> Kind:
    schedule = plan.stages[0].schedule
    return next(kind for kind in kinds if not kind.policies and kind.schedule == schedule)


def why(faster: Candidate | None, budget: int) -> str:
    """Returns why no faster plan was taken, from the one before it on the ladder."""
    if faster is None:
        return "it is the fastest plan there is"
    if faster.compiled_bytes is None:
        return (
            f"the next faster plan, {faster.plan}, is predicted to need "
            f"{gib(faster.predicted_bytes)} (not compiled)"
        )
    return (
        f"the next faster plan, {faster.plan}, needs {gib(faster.compiled_bytes)} compiled, "
        f"{gib(faster.compiled_bytes - budget)} too much"
    )
