"""The process of one part of `benchmarks.planner`: every budget of one step for one chip.

`python -m benchmarks.planner_parts.process CASE DONE` prints each row as a line of JSON as soon as
it is known, and skips the budgets whose places are in DONE. Peaks are kept on disk by the compiled
program, so that another version of the planner finds them.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.cases import Case, config_of, fixed
from experiments.training.build import build
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.costs.flops import count_flops
from jaxckpt.costs.roofline import UNKNOWN, rates_of
from jaxckpt.memory.job import Job
from jaxckpt.memory.worker import get_topology, job_of_built
from jaxckpt.planner.fit import answer
from jaxckpt.planner.problem import Problem
from jaxckpt.planner.result import BudgetError
from jaxckpt.planner.steps import Steps
from jaxckpt.plans import Plan
from jaxckpt.targets.target import parse_target

_NONE = Plan.parse("none")


def rows(case: Case, done: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a case, the largest budget first, without the places that are done."""
    spent: list[float] = []
    steps = _steps_of(case, spent)
    started = time.perf_counter()
    rates = rates_of(parse_target(case["target"])) or UNKNOWN
    problem = Problem.of(steps, config_of(case, "none").model.num_blocks, rates, None)
    rungs = problem.ladder()
    traced = time.perf_counter() - started - sum(spent)
    most, least = steps.report(_NONE).peak_bytes, least_bytes(problem, rungs)
    budgets = np.linspace(most, least, case["budgets"])
    for place, budget in enumerate(map(int, budgets)):
        if place in done:
            continue
        before, started = sum(spent), time.perf_counter()
        found = answer(problem, rungs, budget)
        seconds = time.perf_counter() - started - (sum(spent) - before)
        yield {
            **{"place": place, "budgets": case["budgets"], "budget_bytes": budget},
            **{"plan": str(found.plan), "predicted_bytes": found.chosen.predicted_bytes},
            "compiled_bytes": found.report.peak_bytes,
            "recomputed_flops": found.report.recomputed_flops,
            **_fixed(steps, budget),
            **{"step_seconds": found.chosen.seconds, "compiles": found.num_compiles},
            **{"planning_seconds": traced + seconds, "why": found.why},
        }


def least_bytes(problem: Problem, rungs) -> int:
    """Returns the least budget that works, which the planner names where nothing fits."""
    try:
        return answer(problem, rungs, 1).report.peak_bytes
    except BudgetError as error:
        return error.least_bytes


def _fixed(steps: Steps, budget: int) -> dict[str, Any]:
    """Returns the fixed plan without offloads within the budget that recomputes least."""
    on_device = (Plan.parse(text) for text in fixed() if "offload" not in text)
    plans = sorted(on_device, key=lambda plan: count_flops(steps.trace(plan).jaxpr))
    for plan in plans:
        report = steps.report(plan)
        if report.peak_bytes <= budget:
            found: dict[str, Any] = {"fixed_plan": str(plan), "fixed_bytes": report.peak_bytes}
            return found | {"fixed_recomputed_flops": report.recomputed_flops}
    return {"fixed_plan": None, "fixed_bytes": None, "fixed_recomputed_flops": None}


def _steps_of(case: Case, spent: list[float]) -> Steps:
    """Returns the steps of a case under plans; the seconds in which some compile go to `spent`."""
    target = parse_target(case["target"])
    topology = get_topology(target)
    built = lambda plan: build(config_of(case, str(plan)), case["target"])

    def report_of(plan: Plan) -> MemoryReport | Job:
        step = built(plan)
        job = job_of_built(step, target, topology)
        return steps.kept(plan, job, step.args, options=dict(step.compiler_options))

    began: dict[Any, float] = {}

    def watch(plan, report, seconds: float | None):
        now = time.perf_counter()
        if seconds is None:
            began[plan] = min(began.values(), default=now)
        elif len(began) == 1:
            spent.append(now - began.pop(plan))
        else:
            del began[plan]

    steps = Steps.of_built(built, target, report_of)
    steps.watched(watch)
    return steps


if __name__ == "__main__":
    for row in rows(*map(json.loads, sys.argv[1:])):
        print(json.dumps(row), flush=True)
