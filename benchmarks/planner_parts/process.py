"""The process of one part of `benchmarks.planner`: every budget of one step for one chip.

`python -m benchmarks.planner_parts.process CASE DONE` prints a row as a line of JSON as soon as it
is known, but for the places of budgets that are done. Peaks are kept on disk by program, not by the
sources that made it: another planner finds them.
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
from jaxckpt.memory.built_step import BuiltStep
from jaxckpt.memory.measure import compile_step
from jaxckpt.memory.worker import get_topology, measure_built
from jaxckpt.planner.fit import answer
from jaxckpt.planner.problem import Problem
from jaxckpt.planner.result import BudgetError
from jaxckpt.planner.steps import Steps
from jaxckpt.plans import Plan
from jaxckpt.targets.target import parse_target

_NONE = Plan.parse("none")


def rows(case: Case, done: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a case but for places that are done, the largest budget first."""
    compiler = _Compiler(case)
    steps = compiler.steps
    started = time.perf_counter()
    rates = rates_of(parse_target(case["target"])) or UNKNOWN
    problem = Problem.of(steps, compiler.num_blocks, rates, None)
    rungs = problem.ladder()
    traced = time.perf_counter() - started - compiler.seconds
    budgets = np.linspace(
        steps.report(_NONE).peak_bytes, least_bytes(problem, rungs), case["budgets"]
    )
    for place, budget in enumerate(map(int, budgets)):
        if place in done:
            continue
        before, started = compiler.seconds, time.perf_counter()
        found = answer(problem, rungs, budget)
        seconds = time.perf_counter() - started - (compiler.seconds - before)
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
    """Returns the fixed plan of the device alone within the budget that recomputes least."""
    on_device = (Plan.parse(text) for text in fixed() if "offload" not in text)
    plans = sorted(on_device, key=lambda plan: count_flops(steps.trace(plan).jaxpr))
    for plan in plans:
        report = steps.report(plan)
        if report.peak_bytes <= budget:
            found: dict[str, Any] = {"fixed_plan": str(plan), "fixed_bytes": report.peak_bytes}
            return found | {"fixed_recomputed_flops": report.recomputed_flops}
    return {"fixed_plan": None, "fixed_bytes": None, "fixed_recomputed_flops": None}


class _Compiler:
    """Compiles the step of a case under plans, each program once.

    Attributes:
      num_blocks: Of the step.
      steps: For the planner.
      seconds: What building and compiling took.
    """

    def __init__(self, case: Case):
        self.num_blocks = config_of(case, "none").model.num_blocks
        self._case, self._target = case, parse_target(case["target"])
        is_here = self._target.backend == "local"
        self._topology = None if is_here else get_topology(self._target)
        self.steps = Steps(self._step_for, self._target, self._report_of)
        self.seconds = 0.0

    def _built(self, plan: Plan) -> BuiltStep:
        return build(config_of(self._case, str(plan)), self._case["target"])

    def _step_for(self, plan: Plan):
        step = self._built(plan)
        return step.fn, step.args, {"donate_argnums": step.donate_argnums}

    def _report_of(self, plan: Plan) -> MemoryReport:
        started = time.perf_counter()
        step = self._built(plan)
        options = dict(step.compiler_options)
        report = self.steps.kept(plan, lambda: self._compiled(step), options=options)
        self.seconds += time.perf_counter() - started
        return report

    def _compiled(self, step: BuiltStep) -> MemoryReport:
        if self._topology is None:
            return compile_step(step)[1]
        return measure_built(step, self._target, self._topology)


if __name__ == "__main__":
    for row in rows(*map(json.loads, sys.argv[1:])):
        print(json.dumps(row), flush=True)
