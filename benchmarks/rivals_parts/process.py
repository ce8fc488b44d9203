"""The process of one shape of `benchmarks.rivals`: compiles, plans, and times all in turns.

`python -m benchmarks.rivals_parts.process CASE SECONDS` prints the shape's row as a line of JSON
after compiling and after each round of timing. A line that only has `says` reports progress.

A shape takes about 25 compilations: three anchors of the planner, the plan of least memory, a dozen
fixed plans, and two more for each budget. With a time limit, compiling the fixed plans may take
half of it and compiling the planner's answers most of the rest; timing gets the remainder. A
compilation that `JAX_COMPILATION_CACHE_DIR` has kept takes a second.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from benchmarks.cases import Case, config_of, fixed
from benchmarks.planner_parts.process import least_bytes
from benchmarks.record import device
from benchmarks.result import Row
from benchmarks.rivals_parts.programs import Program, Programs, Turns, failed
from experiments.training.step import init_state, resolve_model
from jaxckpt.costs.roofline import UNKNOWN, rates_of
from jaxckpt.planner.fit import answer
from jaxckpt.planner.problem import Problem
from jaxckpt.planner.result import BudgetError
from jaxckpt.plans import Plan
from jaxckpt.targets.present import usable_bytes
from jaxckpt.targets.target import LOCAL
from jaxckpt.units import iec

_FIXED_SHARE, _OURS_SHARE = 0.5, 0.85
_THREADS = 4  # of compiling
_SPARE = 0.95  # the last round ends after this share of the time


class Shape:
    """One shape: its programs, the rows of plans, the planner's answers, and what was left out."""

    def __init__(self, case: Case, seconds: float | None):
        self._case, self._seconds = case, seconds
        self._started = time.monotonic()
        self._config = config_of(case, "none")
        self.programs = Programs(self._config)
        self._usable = usable_bytes(LOCAL) or sys.maxsize
        self.plans: dict[str, Row] = {}
        self.budgets: list[Row] = []
        self.left_out: list[str] = []

    def run(self) -> Iterator[Row]:
        """Yields the shape's row, with more in it each time."""
        yield from self._compile_fixed()
        yield from self._plan()
        yield self._known({})
        turns = self._turns()
        for done in turns.rounds(self._case["rounds"], self._case["steps"], self._time(_SPARE)):
            yield self._known(self._timed(turns)) | {"rounds": done}
        yield self._known(self._timed(turns)) | {"rounds": done, "is_whole": not self.left_out}

    def _compile_fixed(self) -> Iterator[Row]:
        plans = list(fixed().items())
        # The first plan is compiled alone: XLA's autotuning then fills the cache for all others.
        yield from self._fixed(*plans[0])
        with ThreadPoolExecutor(_THREADS) as pool:
            for found in pool.map(lambda asked: list(self._fixed(*asked)), plans[1:]):
                yield from found

    def _fixed(self, plan: str, names: Sequence[str]) -> Iterator[Row]:
        if not self._has_time(_FIXED_SHARE):
            self.left_out.append(f"the fixed plan {plan}")
            return
        found = self.plans[plan] = {"is_fixed": True, "maxtext": names} | self._compiled(plan)
        what = iec(found["peak_bytes"]) if "peak_bytes" in found else found["error"]
        yield {"says": f"{plan}: {what}, {time.monotonic() - self._started:.0f} s"}

    def _plan(self) -> Iterator[Row]:
        """Asks the planner, for each budget as if it were the only one."""
        steps, num_blocks = self.programs.steps, self._config.model.num_blocks
        problem = Problem.of(steps, num_blocks, rates_of(LOCAL) or UNKNOWN, None, timed=True)
        rungs, anchors = problem.ladder(), dict(steps.compiled)
        found = [plan["peak_bytes"] for plan in self.plans.values() if "peak_bytes" in plan]
        least = min(least_bytes(problem, rungs), *found)
        most = min(steps.report(Plan.parse("none")).peak_bytes, self._usable)
        for budget in map(int, np.linspace(most, least, self._case["budgets"])):
            if not self._has_time(_OURS_SHARE, compiles=2):
                self.left_out.append(f"the budget of {iec(budget)}")
                continue
            steps.compiled = dict(anchors)
            self.budgets.append(self._answer(problem, rungs, budget))
            yield {"says": f"within {iec(budget)}: {self.budgets[-1].get('plan', 'no plan')}"}

    def _answer(self, problem: Problem, rungs, budget: int) -> Row:
        try:
            found = answer(problem, rungs, budget)
        except BudgetError as error:
            return {"budget_bytes": budget, "error": str(error).splitlines()[0]}
        plan = str(found.plan)
        self.plans.setdefault(plan, {"is_fixed": False, "maxtext": ()} | self._compiled(plan))
        chosen = found.chosen
        row = {"budget_bytes": budget, "plan": plan, "compiled_bytes": found.report.peak_bytes}
        row |= {"predicted_bytes": chosen.predicted_bytes, "predicted_seconds": chosen.seconds}
        return row | {"compiles": found.num_compiles, "why": found.why}

    def _compiled(self, plan: str) -> Row:
        found = self.programs.of(plan).as_json()
        if found.get("peak_bytes", 0) > self._usable:
            found["error"] = f"the device has {iec(self._usable)}, its peak is more"
        return found

    def _turns(self) -> Turns:
        config, _ = resolve_model(self._config)
        make_state = jax.jit(lambda: init_state(config))
        shape = (config.batch_size, config.seq_len + 1)
        tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size)
        runnable = [self.programs.of(p) for p, found in self.plans.items() if "error" not in found]
        return Turns(list(dict.fromkeys(runnable)), make_state, tokens)

    def _timed(self, turns: Turns) -> dict[Program, Row]:
        timed: dict[Program, Row] = {}
        for program, seconds in turns.seconds.items():
            timed[program] = {"seconds": float(np.median(seconds)), "seconds_of_rounds": seconds}
        return timed | {program: failed(error) for program, error in turns.errors.items()}

    def _known(self, timed: dict[Program, Row]) -> Row:
        of = self.programs.of
        plans = {plan: found | timed.get(of(plan), {}) for plan, found in self.plans.items()}
        made = self.programs.made
        about = {"device": device(), "versions": {"jax": jax.__version__}, "rounds": 0}
        about |= {"compiles": len(made), "compile_seconds": sum(p.seconds for p in made)}
        about |= {"seconds": time.monotonic() - self._started, "left_out": self.left_out}
        return about | {"is_whole": False, "budgets": self.budgets, "plans": plans}

    def _time(self, share: float) -> float | None:
        return None if self._seconds is None else self._started + share * self._seconds

    def _has_time(self, share: float, compiles: int = 1) -> bool:
        until = self._time(share)
        slowest = max((program.seconds for program in self.programs.made), default=0.0)
        return until is None or time.monotonic() + compiles * slowest <= until


if __name__ == "__main__":
    for row in Shape(*map(json.loads, sys.argv[1:])).run():
        print(json.dumps(row), flush=True)
