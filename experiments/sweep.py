"""Compare plans: memory, time and losses of each, at several depths, on chips present or not.

python -m experiments.sweep -o sweeps/small
python -m experiments.sweep --config configs/qwen3_0p6b.toml --target h100 --plan full --plan sqrt \
  --budget 20GiB -o sweeps/qwen3
python -m experiments.report sweeps/small -o report.html

Every row runs in a process of its own, so that it measures its own memory. The same command goes on
with a sweep that was stopped: finished rows are kept, failed rows are tried again.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from experiments.cli import ConfigFile, main
from experiments.config import ConfigError, TrainConfig, absolute, at_least, check_least
from experiments.files import own_folder
from experiments.sweeping.case import LOCAL, Case
from experiments.sweeping.running import ROWS, run_all
from jaxckpt.plans import Plan, PlanError

# Plans that run on any stack, from the largest peak to the smallest.
PLANS = ("none", "dots_no_batch", "attention", "full", "sqrt", "log")


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepFlags:
    """The rows of a sweep: plans, depths and targets.

    Attributes:
      plan: A checkpointing plan; repeat the flag for more. By default none, dots_no_batch,
        attention, full, sqrt and log.
      depth: Number of blocks; repeat the flag for more. By default `num_blocks` and half of it.
      target: local for the chip of this machine, or one you do not have (v5e-1, h100, ...);
        repeat the flag for more.
      run_steps: Training steps of each plan on local.
    """

    plan: tuple[str, ...] = ()
    depth: tuple[int, ...] = ()
    target: tuple[str, ...] = (LOCAL,)
    run_steps: int = 10

    def __post_init__(self):
        at_least(self, 1, "run_steps")
        for depth in self.depth:
            check_least(1, depth=depth)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings(TrainConfig):
    """The settings that all rows share: a run's settings without its depth, plan and folder.

    Attributes:
      budget: Memory limit per device, e.g. 15GiB; repeat the flag for more. Each adds a row of plan
        auto.
    """

    budget: tuple[str, ...] = ()
    remat: str = "none"

    def __post_init__(self):
        for budget in self.budget or (None,):
            self.with_plan("none" if budget is None else "auto", budget)

    def with_plan(self, plan: str, budget: str | None = None, **model) -> TrainConfig:
        """Returns the configuration of one row."""
        values: dict[str, Any] = {
            field.name: absolute(field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
        }
        values |= {"remat": plan, "budget": budget}
        # A block is timed for the planner alone.
        values["calibrate"] = self.calibrate and Plan.parse(plan).stages[0].schedule == "auto"
        values["model"] = dataclasses.replace(self.model, **model)
        return TrainConfig(**values)


def sweep(
    flags: SweepFlags = SweepFlags(),
    settings: SweepSettings = SweepSettings(),
    *,
    folder: Annotated[Path, Parameter(name=("--folder", "-o"), help="Folder for the rows.")],
    config: ConfigFile = None,
):
    """Run a row for each plan, depth and target; rows that a folder holds already are kept."""
    del config  # read before the other flags were parsed; see experiments.cli
    from experiments.fitting.measuring import check_targets
    from experiments.train import corpus_of
    from experiments.training.display import waiting

    cases = _cases(flags, settings)
    check_targets(flags.target)
    with own_folder(folder, "experiments.sweep", ROWS) as folder:
        if LOCAL in flags.target:
            # Wrong data would fail every row, so they are read before the first.
            with waiting("reading the data"):
                corpus_of(settings.with_plan("none"))
        command = shlex.join(["python", "-m", "experiments.sweep", *sys.argv[1:]])
        run_all(cases, folder, command=command)


def _cases(flags: SweepFlags, settings: SweepSettings) -> list[Case]:
    """Returns the rows to run, each checked before any of them runs."""
    # The plan auto has a row for each budget. Without a budget it is refused, as in a run.
    plans = [plan for plan in flags.plan or PLANS if not (plan == "auto" and settings.budget)]
    asked = [(plan, None) for plan in plans]
    asked += [("auto", budget) for budget in settings.budget]
    depths = flags.depth or _usual_depths(plans, settings.model.num_blocks)
    configs = [
        settings.with_plan(plan, budget, num_blocks=depth)
        for depth in depths
        for plan, budget in asked
    ]
    found = [
        Case(config=config, target=target, run_steps=flags.run_steps)
        for target in flags.target
        for config in configs
    ]
    for case in found:
        _ = case.config.plan  # raises PlanError
    keys = [case.key for case in found]
    if len(set(keys)) < len(keys):
        raise ConfigError("a plan, budget, depth or target is given twice")
    return found


def _usual_depths(plans: Sequence[str], num_blocks: int) -> tuple[int, ...]:
    """Returns a model's depth and half of it, so that growth is seen, if every plan fits both."""
    half = num_blocks // 2
    try:
        for plan in plans:
            Plan.parse(plan).bind(half)
    except PlanError:
        return (num_blocks,)
    return (num_blocks, half)


if __name__ == "__main__":
    main(sweep)
