"""The process that plans for an absent chip: `python -m jaxckpt.planner.worker FOLDER`.

`planner/absent.py` starts this process, as `absent/jobs.py` starts `jaxckpt.memory.worker`. The
process traces and compiles every plan itself, because the target's topology exists only in this
process. It is not meant to be run by hand.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxckpt.absent import launch
from jaxckpt.absent.jobs import Entry, entry_key
from jaxckpt.compiled import cache
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.memory.job import Job
from jaxckpt.memory.worker import answer, build_step, get_topology, job_of_built
from jaxckpt.planner.fit import solve
from jaxckpt.planner.result import BudgetError, Compilation
from jaxckpt.planner.steps import Steps
from jaxckpt.plans import Plan
from jaxckpt.plans.plan_set import PlanSet, plan_json
from jaxckpt.targets.target import parse_target


def main(folder: Path):
    """Plans the job of a folder and writes the answer into the folder."""
    with (folder / launch.PROGRESS).open("w") as lines:

        def progress(one: Compilation):
            print(json.dumps(dataclasses.asdict(one)), file=lines, flush=True)

        answer(folder, functools.partial(_run, progress))


def _run(progress: Callable[[Compilation], None], job: dict[str, Any]) -> dict[str, Any]:
    target = parse_target(job["target"])
    topology = get_topology(target)

    def entry_of(plan: Plan | PlanSet) -> Entry:
        given = job["entry"]
        arguments = given["arguments"] | {"plan": plan_json(plan)}
        return Entry(function=given["function"], arguments=arguments)

    built = lambda plan: build_step(**entry_of(plan).as_json())

    def report_of(plan: Plan | PlanSet) -> MemoryReport | Job:
        name = entry_key(entry_of(plan), target)
        known = cache.load(name)
        return known or job_of_built(built(plan), target, topology).storing(name)

    steps = Steps.of_built(built, target, report_of)
    try:
        budgets = {name: job[name] for name in ("budget", "host_budget", "unit")}
        result = solve(steps, job["num_blocks"], target=target, progress=progress, **budgets)
    except BudgetError as error:
        return {"infeasible": error.as_json()}
    return {"result": result.as_json()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
