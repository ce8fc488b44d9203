"""The process of one model of `benchmarks.functions`: budgets from the peak of `none` to the least.

`python -m benchmarks.functions_parts.process CASE DONE` prints each row as a line of JSON as soon
as the row is known. It skips the budgets whose places are in DONE. When the time limit is over, the
process ends itself, even inside a compiler. Compiled programs are kept on disk.
"""

import functools
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxckpt
from benchmarks.functions_parts.models import MODELS
from benchmarks.record import device
from experiments.training.compilation import keep_compiled
from jaxckpt.costs.flops import count_flops
from jaxckpt.costs.roofline import UNKNOWN, estimate, rates_of
from jaxckpt.planner.fit import answer
from jaxckpt.planner.problem import Problem
from jaxckpt.planner.result import BudgetError
from jaxckpt.planner.steps import Steps
from jaxckpt.plans import Plan, PlanError
from jaxckpt.targets.target import parse_target

Case = dict[str, Any]
_TIMES = 10
# The checkpoints that a user would write by hand: none, one around each stage, one around the whole
# function, and `dots` around the whole function.
_BY_HAND = ("none", "stages", "full", "dots")


def step_for(case: Case, plan: Any) -> tuple[Callable, tuple]:
    """Returns a model's gradient function and its abstract arguments.

    Args:
      case: The model, target and size.
      plan: A plan, or `"stages"` for a `jax.checkpoint` around every stage.
    """
    model = MODELS[case["model"]]
    size = model.small if case["tiny"] else model.size
    dtype = jnp.float32 if case["tiny"] else jnp.bfloat16
    wrap = jax.checkpoint if plan == "stages" else lambda stage: stage
    run = functools.partial(model.run, wrap=wrap)
    region = run if plan == "stages" else jaxckpt.checkpoint(run, remat=plan)

    def loss(params, inputs, key):
        out = region(params, inputs, key)
        leaves = jax.tree.leaves(out)
        return sum(jnp.square(leaf.astype(jnp.float32)).mean() for leaf in leaves)

    made = lambda key: (model.params(key, size), model.inputs(size, dtype), key)
    return jax.value_and_grad(loss), jax.eval_shape(made, jax.random.key(0))


def rows(case: Case, done: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a model, the largest budget first.

    Args:
      case: The model, target and size.
      done: The places of budgets whose rows exist already; -1 for the row of plans by hand.
    """
    target, is_here = parse_target(case["target"]), case["target"] == "local"
    steps = Steps(functools.partial(step_for, case), target)
    rates = rates_of(target) or UNKNOWN
    with steps.compiling(map(_plan_of, _BY_HAND)):
        pass
    started = time.perf_counter()
    problem = Problem.of(steps, None, rates)
    rungs = problem.ladder()
    planned = time.perf_counter() - started  # without compilations, which are all made above
    top, least = steps.report(Plan.parse("none")).peak_bytes, _least_bytes(problem, rungs)
    exact = _gradients(case, "none") if is_here and case["tiny"] else None
    if -1 not in done:
        yield {
            "place": -1,
            "hand": dict(_by_hand(case, steps, rates)),
            "planned": planned,
            "least": least,
            "equations": len(steps.trace(Plan.parse("none")).jaxpr.jaxpr.eqns),
        }
    for place, budget in enumerate(map(int, np.linspace(top, least, case["budgets"]))):
        if place in done:
            continue
        found = answer(problem, rungs, budget)
        yield {
            "place": place,
            "budget_bytes": budget,
            "plan": str(found.plan),
            "peak_bytes": found.report.peak_bytes,
            "predicted_bytes": found.chosen.predicted_bytes,
            "compiles": found.num_compiles,
            "keeps": list(found.keeps),
            **_time_of(case, found.plan, rates, is_here),
            "gradient_error": _error(exact, case, found.plan) if exact is not None else None,
            "device": device() if is_here else None,
        }


def _least_bytes(problem: Problem, rungs) -> int:
    try:
        return answer(problem, rungs, 1).report.peak_bytes
    except BudgetError as error:
        return error.least_bytes


def _plan_of(name: str) -> Any:
    return name if name == "stages" else Plan.parse(name)


def _by_hand(case: Case, steps: Steps, rates) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each plan by hand with its figures.

    The plan `dots` is left out if products are complex, because `jax.checkpoint` cannot keep a
    complex value.
    """
    for name in _BY_HAND:
        try:
            report = steps.report(_plan_of(name))
        except PlanError:
            continue
        made = {"bytes": report.peak_bytes, "temp": report.temp_bytes}
        yield name, made | _time_of(case, name, rates, case["target"] == "local")


def _time_of(case: Case, plan: Any, rates, is_here: bool) -> dict[str, float]:
    """Returns a step's roofline seconds, its FLOPs, and on an accelerator its measured seconds."""
    fn, args = step_for(case, plan)
    jaxpr = jax.make_jaxpr(fn)(*args)
    made: dict[str, float] = {"roofline": estimate(jaxpr, rates).seconds}
    made["flops"] = count_flops(jaxpr)
    if is_here and jax.default_backend() != "cpu":
        made["seconds"] = _seconds(jax.jit(fn), _arrays(case))
    return made


def _arrays(case: Case) -> tuple:
    model = MODELS[case["model"]]
    size = model.small if case["tiny"] else model.size
    dtype = jnp.float32 if case["tiny"] else jnp.bfloat16
    key = jax.random.key(0)
    inputs = model.inputs(size, dtype)
    drawn = lambda x: x + jax.random.normal(key, x.shape, x.dtype)
    is_real = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    inputs = jax.tree.map(lambda x: drawn(x) if is_real(x) else x, inputs)
    return jax.jit(model.params, static_argnums=1)(key, _Frozen(size)), inputs, key


class _Frozen(dict):
    """A model's size with a hash, so that `jit` takes it as a static argument."""

    def __hash__(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(tuple(self.items()))


def _seconds(step: Callable, args: tuple) -> float:
    for _ in range(2):
        jax.block_until_ready(step(*args))
    found = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        jax.block_until_ready(step(*args))
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _gradients(case: Case, plan: Any):
    fn, _ = step_for(case, plan)
    with jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(fn)(*_arrays(case)))


def _error(exact, case: Case, plan: Any) -> float:
    """Returns the largest difference of a leaf, as a share of the leaf's largest value."""
    pairs = zip(jax.tree.leaves(exact), jax.tree.leaves(_gradients(case, plan)), strict=True)
    shares = (np.abs(a - b).max() / max(np.abs(a).max(), 1e-30) for a, b in pairs)
    return float(max(shares))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    # Programs compiled for planning are timed too, and a continued run reads them from disk.
    keep_compiled(None, print)
    signal.alarm(asked["limit"])  # by default the signal ends the process, even inside a compiler
    for row in rows(asked, json.loads(sys.argv[2])):
        print(json.dumps(row), flush=True)
