"""`fit`: bytes in, the fastest training step that fits out.

    result = jaxckpt.fit(step_for, num_blocks=28, target="v5e-1", budget="15GiB")
    print(result)                # --remat=..., its compiled peak, why nothing faster fits

`step_for(plan)` returns the step as a function and its (abstract) arguments. The stacks in it are
found by tracing, blocks are costed as `costs.py` says, plans put together in `pieces.py` and
ordered in `ladder.py`, and `search.py` compiles a few. A plan is only returned if the compiler's
own peak of its step is within the budget.

Limits: all stacks of a step that follow the plan have `num_blocks` blocks and get the same plan;
seconds are a roofline's.
"""

from collections.abc import Callable, Sequence

from jaxckpt.memory.targets import Target, parse_target
from jaxckpt.planner.budgets import budget_bytes, check_asked
from jaxckpt.planner.problem import Problem
from jaxckpt.planner.rates import rates_of
from jaxckpt.planner.result import FitResult
from jaxckpt.planner.search import search
from jaxckpt.planner.steps import Steps

MOST_COMPILES = 6


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
    check_asked(num_blocks)
    target = parse_target(target)
    budget = budget_bytes(budget, target)
    return solve(Steps(step_for, target), num_blocks, target=target, budget=budget, block=block)


def solve(
    steps: Steps, num_blocks: int, *, target: Target, budget: int, block: Sequence | None = None
) -> FitResult:
    """Returns what `fit` does, of steps that may be compiled elsewhere.

    Raises:
      BudgetError: No plan fits.
      ValueError: The step ignores its plan, or runs stacks of another number of blocks.
    """
    rates = rates_of(target).times(steps.num_devices)
    problem = Problem.of(steps, num_blocks, rates, block)
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
    if found.chosen is not None:
        return problem.result(rungs, found.chosen, budget)
    # A plan that was compiled to calibrate the model may fit where predictions were wrong.
    least = problem.least()
    if least is None or problem.peak(least.draft.plan) > budget:
        raise problem.infeasible(budget)
    return problem.result((*rungs, least), len(rungs), budget)
