"""`fit`: bytes in, the fastest training step that fits out.

    result = jaxckpt.fit(step_for, num_blocks=28, target="v5e-1", budget="15GiB")
    print(result)                # --remat=..., its compiled peak, why nothing faster fits

`step_for(plan)` returns the step as a function and its (abstract) arguments. The stacks in it are
found by tracing, blocks are cost as `costs.py` says, plans put together in `pieces.py` and ordered
in `ladder.py`, and `search.py` compiles a few. A plan is only returned if the compiler's own peak
of its step is within the budget.

Limits: all stacks of a step that follow the plan have `num_blocks` blocks and get the same plan;
seconds are a roofline's.
"""

import dataclasses
from collections.abc import Callable, Sequence

from jaxckpt.memory.flops import count_flops
from jaxckpt.memory.roofline import Rates, estimate
from jaxckpt.memory.targets import Target, parse_target
from jaxckpt.memory.units import gib
from jaxckpt.planner import pieces
from jaxckpt.planner.budgets import budget_bytes, rates_of
from jaxckpt.planner.costs import Forward, Kind, forward_cost
from jaxckpt.planner.kinds import find_kinds
from jaxckpt.planner.ladder import Rung, ladder
from jaxckpt.planner.peak import PeakModel
from jaxckpt.planner.pieces import Draft
from jaxckpt.planner.result import BudgetError, Candidate, FitResult
from jaxckpt.planner.search import search
from jaxckpt.planner.stacks import given_stack
from jaxckpt.planner.steps import Steps
from jaxckpt.plans import Plan, PlanError

_NONE, _FULL = Plan.parse("none"), Plan.parse("full")
MOST_COMPILES = 6
_LEAST_FOR_STAGES = 4  # blocks; fewer are hardly ever worth two stages


def fit(
    step_for: Callable,
    *,
    num_blocks: int,
    target: str | Target = "local",
    budget: str | int | float = "auto",
    block: Sequence | None = None,
) -> FitResult:
    """Returns the fastest plan whose compiled peak is within a budget.

    Args:
      step_for: `step_for(plan) -> (fn, args)`, or `(fn, args, options)` with `donate_argnums` and
        `static_argnums` as for `jaxckpt.measure`: the step under a `Plan`. Arguments may be
        abstract.
      num_blocks: L, the blocks of each stack that follows the plan.
      target: The chip, as for `jaxckpt.measure`.
      budget: Bytes a device, such as `"15GiB"`, or `"auto"`: what the target can use.
      block: `(block, params_i, carry, *consts)`, as for `jaxckpt.explain`, for a step that runs
        its blocks by other means than `scan_blocks` and jaxckpt's adapters.

    Raises:
      BudgetError: No plan fits; it names the least budget that works, and its plan.
      ValueError: A budget or `num_blocks` that is none, or a step that ignores its plan.
      ImportError: scipy is not installed.

    Example:
      >>> import jax, jax.numpy as jnp, jaxckpt
      >>> def step_for(plan):
      ...     block = lambda x, w: jnp.tanh(x @ w)
      ...     loss = lambda w, x: jaxckpt.scan_blocks(block, w, x, remat=plan).sum()
      ...     return jax.grad(loss), (jnp.ones([8, 16, 16]), jnp.ones([256, 16]))
      >>> result = jaxckpt.fit(step_for, num_blocks=8, budget="1MiB")
      >>> result.report.peak_bytes <= result.budget_bytes
      True
    """
    _check(num_blocks)
    target = parse_target(target)
    budget = budget_bytes(budget, target)
    steps, rates = Steps(step_for, target), rates_of(target)
    problem = _Problem.of(steps, num_blocks, rates, block)
    rungs = problem.ladder()
    known = {
        place: problem.peak(rung.draft.plan)
        for place, rung in enumerate(rungs)
        if rung.draft.plan in steps.compiled
    }
    found = search(
        rungs,
        budget,
        lambda place: problem.peak(rungs[place].draft.plan),
        known,
        MOST_COMPILES - len(steps.compiled),
    )
    if found.chosen is None:
        raise problem.infeasible(budget)
    return problem.result(rungs, found.chosen, budget)


def _check(num_blocks: int):
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or num_blocks < 1:
        raise ValueError(f"num_blocks is {num_blocks!r}; a stack has a whole number, at least 1")
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise ImportError(
            "jaxckpt.fit needs scipy, which is not installed: pip install 'jaxckpt[planner]'"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Problem:
    """A step with everything that does not depend on the budget."""

    steps: Steps
    num_blocks: int
    kinds: tuple[Kind, ...]
    plain: tuple[Kind, ...]
    forward: Forward
    model: PeakModel
    seconds: float
    flops: int

    @classmethod
    def of(cls, steps: Steps, num_blocks: int, rates: Rates, block) -> "_Problem":
        """Traces the step, costs its blocks and compiles its anchors."""
        stacks, seconds, flops = _stacks(steps, num_blocks, rates, block)
        kinds, plain = find_kinds(stacks, rates)
        none, full = (_kind_of(plain, plan) for plan in (_NONE, _FULL))
        peaks = [steps.report(plan).peak_bytes for plan in (_FULL, _NONE)]
        model = PeakModel.between(full, peaks[0], none, peaks[1], num_blocks)
        # From here on `none` weighs what it weighs once compiled.
        swap = lambda found: tuple(model.none if kind is none else kind for kind in found)
        halves = [pieces.run_of(full, num_blocks // 2)]
        if num_blocks >= _LEAST_FOR_STAGES:
            halves.append(pieces.run_of(model.none, num_blocks - num_blocks // 2))
            mixed = pieces.draft(halves)
            model = model.with_stages(mixed, steps.report(mixed.plan).peak_bytes)
        return cls(
            steps=steps,
            num_blocks=num_blocks,
            kinds=swap(kinds),
            plain=swap(plain),
            forward=forward_cost(stacks, rates),
            model=model,
            seconds=seconds - num_blocks * full.seconds,
            flops=flops - round(num_blocks * full.flops),
        )

    def peak(self, plan: Plan) -> int:
        """Returns the compiled peak of a plan."""
        return self.steps.report(plan).peak_bytes

    def ladder(self) -> tuple[Rung, ...]:
        """Returns the plans worth compiling, fastest first."""
        found = [
            self._rung(one) for one in pieces.drafts(self.kinds, self.forward, self.num_blocks)
        ]
        plain = [pieces.draft([pieces.run_of(kind, self.num_blocks)]) for kind in self.plain]
        return ladder(found, [self._rung(one) for one in plain])

    def _rung(self, draft: Draft) -> Rung:
        seconds = max(self.seconds, 0.0) + draft.seconds
        return Rung(draft=draft, predicted_bytes=self.model.predict(draft), seconds=seconds)

    def candidate(self, rung: Rung) -> Candidate:
        """Returns a rung as the user sees it."""
        report = self.steps.compiled.get(rung.draft.plan)
        return Candidate(
            plan=rung.draft.plan,
            predicted_bytes=rung.predicted_bytes,
            compiled_bytes=None if report is None else report.peak_bytes,
            seconds=rung.seconds,
            flops=self.flops + round(rung.draft.flops),
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
            keeps=tuple(map(self._keeps, rungs[place].draft.stages)),
            why=_why(candidates[place - 1] if place else None, budget),
            num_compiles=len(self.steps.compiled),
        )

    def _keeps(self, stage) -> str:
        kind = next(
            (
                k
                for k in self.kinds
                if k.policies == stage.policies and k.schedule == stage.schedule
            ),
            None,
        )
        if kind is None:
            return f"{stage}: carries in slots, a segment's residuals in turn"
        host = f", {gib(int(stage.count * kind.host_bytes))} on the host" if kind.host_bytes else ""
        return f"{stage}: {gib(int(stage.count * kind.kept_bytes))} on the device{host}"

    def infeasible(self, budget: int) -> BudgetError:
        """Returns the error for a budget that no plan fits."""
        plan, report = min(self.steps.compiled.items(), key=lambda item: item[1].peak_bytes)
        none = next(kind for kind in self.plain if kind.schedule == "none")
        body = report.peak_bytes - report.argument_bytes
        block = min(none.kept_bytes, body)
        return BudgetError(
            budget_bytes=budget,
            plan=plan,
            report=report,
            parts={
                "arguments (weights, optimizer, batch)": report.argument_bytes,
                "one block's residuals": block,
                "gradients, head, carries and working memory": body - block,
            },
        )


def _stacks(steps: Steps, num_blocks: int, rates: Rates, block):
    """Returns the stacks that follow the plan, and the seconds and FLOPs of the step under `full`.

    Raises:
      ValueError: No stack follows the plan, or one has another number of blocks.
    """
    try:
        jaxpr, finder = steps.trace(_FULL)
    except PlanError as error:
        raise ValueError(f"step_for('full') does not trace: {error}") from error
    stacks = list(finder.stacks) if block is None else [given_stack(block, num_blocks)]
    if not stacks:
        raise ValueError(_ignored(steps, jaxpr, finder.others))
    for stack in stacks:
        if stack.num_blocks != num_blocks:
            raise ValueError(
                f"num_blocks is {num_blocks}, but the step runs a stack of {stack.num_blocks} "
                "blocks under the plan"
            )
    if block is not None and str(steps.trace(_NONE)[0]) == str(jaxpr):
        raise ValueError(_ignored(steps, jaxpr, finder.others))
    return stacks, estimate(jaxpr, rates).seconds, count_flops(jaxpr)


def _ignored(steps: Steps, jaxpr, others: Sequence[str]) -> str:
    if others:
        return (
            f"step_for ignores its plan: asked for 'full', its stack runs under {others[0]!r}; "
            "hand the plan to scan_blocks or Stack as remat="
        )
    if str(steps.trace(_NONE)[0]) == str(jaxpr):
        return "step_for ignores its plan: the program is the same under 'none' and 'full'"
    return (
        "the step runs no scan_blocks or jaxckpt Stack while it is traced; give the block as "
        "block=(block, params_i, carry, *consts)"
    )


def _kind_of(kinds: Sequence[Kind], plan: Plan) -> Kind:
    schedule = plan.stages[0].schedule
    return next(kind for kind in kinds if not kind.policies and kind.schedule == schedule)


def _why(faster: Candidate | None, budget: int) -> str:
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
