"""`fit`: from a budget in bytes to the fastest training step that fits.

    result = jaxckpt.fit(step_for, target="v5e-1", budget="15GiB")
    print(result)                # --remat=..., its compiled peak, why nothing faster fits

`step_for(plan)` returns the step as a function and its (abstract) arguments. Tracing finds the
step's stacks, chains and functions under `jaxckpt.checkpoint` (`places.py`). Kinds of blocks are
costed (`kinds.py`). Drafts are made for stacks (`across_blocks.py`, `across_stacks.py`), functions
and chains (`graphs.py`). A few drafts are compiled (`search.py`). A plan is returned only if the
compiled peak of its step is within the budget.

Each stack that is given by name gets its own plan (`problem.py`).

Limits: stacks that follow one plan have the same number of blocks. Seconds are roofline estimates.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxckpt.absent import launch
from jaxckpt.costs.roofline import UNKNOWN, rates_of
from jaxckpt.planner.across_blocks import Draft
from jaxckpt.planner.across_stacks import WORDS_GAIN
from jaxckpt.planner.budgets import budget_bytes, check_asked, host_bytes
from jaxckpt.planner.offload_check import verdict
from jaxckpt.planner.problem import Problem
from jaxckpt.planner.result import BudgetError, Compilation, FitResult
from jaxckpt.planner.search import search
from jaxckpt.planner.steps import Steps, check_blocks, everywhere
from jaxckpt.targets.present import chip_of
from jaxckpt.targets.target import Target, parse_target
from jaxckpt.units import unit_of

MOST_COMPILES = 6
_CORES_TO_GUESS = 3  # compiling the plan that is needed for sure keeps one or two cores busy
_LOG = logging.getLogger(__name__)
_CALIBRATED = "the roofline, calibrated by a block timed here"


def fit(
    step_for: Callable,
    *,
    num_blocks: int | Mapping[str, int] | None = None,
    target: str | Target = "local",
    budget: str | int | float = "auto",
    host_budget: str | int | float = 0,
    calibrate: bool = False,
    block: Sequence | Mapping[str, Sequence] | None = None,
    progress: Callable[[Compilation], Any] | None = None,
) -> FitResult:
    """Finds the fastest plan whose compiled peak is within a budget.

    Args:
      step_for: `step_for(plan) -> (fn, args)`, the step under a `Plan`; or `(fn, args, options)`
        with `donate_argnums` and `static_argnums`. Arguments may be abstract.
      num_blocks: The number of blocks of each stack that follows the plan, L; by default tracing
        finds the number. A mapping from names to numbers, such as `{"encoder": 12, "head": 1}`,
        gives each stack its own plan: `step_for` gets a mapping from names to plans, the result
        has such a mapping, and all stacks share the budget. A function under `jaxckpt.checkpoint`
        counts as 1 block.
      target: The chip: `"local"`, or an absent chip, such as `"v5e-4"` or `"h100"`.
      budget: Bytes per device, such as `"15GiB"`; `"auto"` for all memory that a program may fill.
      host_budget: Bytes of pinned host memory per device that a plan may use, such as `"32GiB"`;
        by default nothing is moved to the host.
      calibrate: Whether to time a block once on this process's device and to plan with the measured
        seconds; only for the target `local`.
      block: `(block, params_i, carry, *consts)`, as for `jaxckpt.explain`, for a step that runs its
        blocks without `scan_blocks` or an adapter; for several stacks, a mapping from names to such
        tuples, in the order in which the stacks run.
      progress: Called with a `Compilation` before and after each compilation; `print` is a valid
        function. Several compilations may run at once.

    Returns:
      A `FitResult`: the plan, the memory report of its compiled step, and the other candidates.
      `print` shows it.

    Raises:
      BudgetError: No plan fits; the error names the least budget that works, and its plan.
      ValueError: `budget` or `num_blocks` is not valid, or the step ignores its plan.

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
    check_asked(num_blocks)
    target = parse_target(target)
    asked: dict[str, Any] = {"budget": budget_bytes(budget, target), "unit": unit_of(budget)}
    asked["host_budget"] = host_bytes(host_budget)
    check_blocks(block, num_blocks)
    if calibrate and target.backend != "local":
        raise ValueError(f"calibrate times the chip of this process; {target} is not it")
    return solve(
        Steps(step_for, target),
        num_blocks,
        target=target,
        **asked,
        calibrate=calibrate,
        block=block,
        progress=progress,
    )


def solve(
    steps: Steps,
    num_blocks: int | Mapping[str, int] | None = None,
    *,
    target: Target,
    budget: int,
    host_budget: int = 0,
    unit: str = "",
    calibrate: bool = False,
    block: Sequence | Mapping[str, Sequence] | None = None,
    progress: Callable[[Compilation], Any] | None = None,
) -> FitResult:
    """Finds the fastest plan as `fit` does, for steps that another process may compile.

    Args:
      steps: Returns, traces and compiles the step of a plan.
      num_blocks: As for `fit`.
      target: The chip.
      budget: The budget per device, in bytes.
      host_budget: The host's budget per device, in bytes.
      unit: The unit in which texts show bytes; empty for units that fit the sizes.
      calibrate: As for `fit`.
      block: As for `fit`.
      progress: As for `fit`.

    Returns:
      The plan, its memory report and the other candidates.

    Raises:
      BudgetError: No plan fits.
      ValueError: The step ignores its plan, or runs a stack of another number of blocks.
    """
    if progress is not None:
        _report(progress, steps, budget, unit)
    num_devices = steps.num_devices(everywhere(num_blocks, "full"))
    rates = (rates_of(target) or UNKNOWN).times(num_devices)
    allowed = 0
    found: dict[str, Any] = {"clock": _CALIBRATED} if calibrate else {}
    if host_budget:
        offload = verdict(target, calibrate or chip_of(target) is not None)
        allowed = host_budget if offload.allowed else 0
        found |= {"host_budget_bytes": host_budget, "offload": offload.text}
    problem = Problem.of(steps, num_blocks, rates, block, host_bytes=allowed, timed=calibrate)
    try:
        result = answer(problem, problem.ladder(), budget)
    except BudgetError as error:
        raise error.replaced(offload=found.get("offload", ""), unit=unit) from None
    return dataclasses.replace(result, **found, unit=unit)


def _report(progress: Callable[[Compilation], Any], steps: Steps, budget: int, unit: str):
    """Calls `progress` before and after every compilation."""
    numbers: dict[Any, int] = {}
    running: dict[Any, int] = {}
    begun = time.perf_counter()

    def watch(plan, report, seconds: float | None):
        number = numbers.setdefault(plan, len(numbers) + 1)
        if seconds is None:
            running[plan] = number
        else:
            del running[plan]
            if report is None:
                return
        most, done = max(len(numbers), MOST_COMPILES), len(numbers) - len(running)
        spent = time.perf_counter() - begun
        progress(
            Compilation(
                number=number,
                most=most,
                plan=str(plan),
                budget_bytes=budget,
                unit=unit,
                peak_bytes=None if report is None else report.peak_bytes,
                seconds=seconds or 0.0,
                running=tuple((number, str(plan)) for plan, number in running.items()),
                most_left=spent / done * (most - done) if done else None,
            )
        )

    steps.watched(watch)


def answer(problem: Problem, rungs: Sequence[Draft], budget: int) -> FitResult:
    """Returns the answer of a problem for one budget.

    A plan that was compiled for one budget is not compiled again for another budget. Otherwise
    budgets do not influence each other: a new problem would give the same answer.

    Args:
      problem: A step with its compiled anchors.
      rungs: The result of `problem.ladder()`, which is the same for every budget.
      budget: The budget in bytes.

    Returns:
      The plan, its memory report and the other candidates.

    Raises:
      BudgetError: No plan fits.
    """
    anchors = problem.steps.compiled
    problem = problem.apart(anchors)
    left_out: list[str] = []
    while True:
        try:
            chosen = _searched(problem, rungs, budget)
        except _DoesNotRun as error:
            if len(left_out) == MOST_COMPILES:  # the step itself must be at fault
                raise error.cause from None
            plan = rungs[error.place].plan
            left_out.append(f"{plan}: {type(error.cause).__name__}: {error.cause}".splitlines()[0])
            _LOG.debug("%s does not run", plan, exc_info=error.cause)
            rungs = [rung for place, rung in enumerate(rungs) if place != error.place]
        else:
            break
    if chosen is None:
        # If predictions were wrong, an anchor may still fit. The last rung is compiled whenever no
        # other rung fits, so the least budget that the error names does work.
        problem = problem.apart([*anchors, rungs[-1].plan])
        least = problem.least()
        if least is None or problem.peak(least.plan) > budget:
            raise problem.infeasible(budget)
        rungs, chosen = (*rungs, least), len(rungs)
    found = problem.result(rungs, _in_words(problem, rungs, chosen, budget), budget)
    return dataclasses.replace(found, left_out=tuple(left_out))


def _in_words(problem: Problem, rungs: Sequence[Draft], chosen: int, budget: int) -> int:
    """Returns the place of the fastest plan in words that fits and is hardly slower.

    If the chosen plan is not a graph's plan, or no such plan fits, returns the chosen place.
    """
    compiled, limit = problem.steps.compiled, (1 + WORDS_GAIN) * rungs[chosen].seconds
    if not rungs[chosen].graph:
        return chosen
    in_words = (
        place
        for place, rung in enumerate(rungs)
        if not rung.graph and rung.seconds <= limit and rung.plan in compiled
    )
    fitting = (place for place in in_words if compiled[rungs[place].plan].peak_bytes <= budget)
    return min(fitting, key=lambda place: rungs[place].seconds, default=chosen)


class _DoesNotRun(Exception):
    """The step cannot be traced or compiled under the plan of a rung."""

    def __init__(self, place: int, cause: Exception):
        self.place, self.cause = place, cause


def _searched(problem: Problem, rungs: Sequence[Draft], budget: int) -> int | None:
    """Returns the place of the fastest rung that is known to fit, or None if no rung fits."""
    compiled = problem.steps.compiled
    peaks = [report.peak_bytes for report in compiled.values()]

    def prepare(places: Sequence[int]):
        # The second place is a guess, compiled only on cores that would be idle.
        sure = len(places) if launch.at_once() >= _CORES_TO_GUESS else 1
        with problem.steps.compiling(rungs[place].plan for place in places[:sure]):
            pass

    def compile_peak(place: int) -> int:
        try:
            return problem.peak(rungs[place].plan)
        except Exception as error:  # the user's step and the compiler may raise anything
            raise _DoesNotRun(place, error) from error

    known = {
        place: compiled[rung.plan].peak_bytes
        for place, rung in enumerate(rungs)
        if rung.plan in compiled
    }
    options: dict[str, Any] = {"is_answered": min(peaks) <= budget, "prepare": prepare}
    compiles = MOST_COMPILES - len(compiled)
    return search(rungs, budget, compile_peak, known, compiles, **options).chosen
