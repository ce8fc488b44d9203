"""Will it fit? Compile the train step for chips that need not be there, under several plans.

python -m experiments.fit --config configs/qwen3_0p6b.toml --target v5e-1 --plan none --plan sqrt
python -m experiments.fit --config configs/qwen3_0p6b.toml --target v5e-1 --plan auto --budget 15GiB
python -m experiments.fit --config configs/qwen3_0p6b.toml --target h100 --max batch-size
python -m experiments.fit --config configs/qwen3_8b.toml --target v5e-16 --mesh fsdp=16
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from experiments import files
from experiments.cli import ConfigFile, fail, main
from experiments.config import ConfigError, TrainConfig, at_least, expanded
from experiments.files import versions
from jaxckpt.plans import PlanError
from jaxckpt.targets.target import LOCAL

# From the fastest plan, with the largest peak, to the smallest.
PLANS = ("none", "dots_no_batch", "full+attention+names:q,k,v,mid,gate,up")
PLANS += ("attention", "full", "sqrt", "log")


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FitFlags:
    """Targets, plans and sizes to compile a configuration for.

    Attributes:
      target: local for the chip of this machine, or one you do not have (v5e-1, h100, ...);
        repeat the flag for more.
      plan: A checkpointing plan; repeat the flag for more. auto is the fastest within `budget`. By
        default a sensible set.
      max: Find the largest batch-size or seq-len that fits, for each plan and target.
      json: File for the rows.
      parallel: Compilations at once, each in a process of its own.
    """

    target: tuple[str, ...] = ("local",)
    plan: tuple[str, ...] = ()
    max: Literal["batch-size", "seq-len"] | None = None
    json: Path | None = None
    parallel: int = 2

    def __post_init__(self):
        at_least(self, 1, "parallel")
        if self.json is not None:
            object.__setattr__(self, "json", expanded(self.json, "json"))
            files.check_output(self.json, ())


def fit(
    flags: FitFlags = FitFlags(),
    settings: TrainConfig = TrainConfig(),
    *,
    config: ConfigFile = None,
):
    """Compile the train step under plans and for targets; print which fit and how fast they are."""
    del config  # read before the other flags were parsed; see experiments.cli
    from experiments.fitting import table
    from experiments.fitting.measuring import check_targets, measure_all
    from experiments.fitting.row import FitRow
    from experiments.training.choose_plan import check_calibrated
    from experiments.training.compilation import keep_compiled
    from experiments.weights.load import check_shape

    check_shape(settings)
    cases = _cases(settings, flags)
    check_calibrated(settings, [config.plan for config, _ in cases], flags.target)
    check_targets(flags.target, settings.mesh_shape)
    if LOCAL.name in flags.target:
        keep_compiled(settings.compile_cache, print)
    done: list[FitRow] = []
    asked = {"largest": flags.max, "parallel": flags.parallel}
    try:
        rows = measure_all(cases, **asked, done=done.append)
    except KeyboardInterrupt:
        if done:
            table.show(done, settings, flags.max)
        again = "; asking again starts from these" * bool(done)
        raise KeyboardInterrupt(f"{len(done)} of {len(cases)} rows are done{again}") from None
    failed = [row for row in rows if row.error is not None]
    if len(failed) < len(rows) or len(rows) > 1:
        table.show(rows, settings, flags.max)
    if settings.explain:
        from experiments.training.build import build
        from experiments.training.plan_checks import explained

        shown = [row for row in rows if row not in failed]
        for row in (row for row in shown if row.target == shown[0].target):
            for text in explained(build(row.config, row.target)):
                print(f"\n{text}")
    if flags.json is not None:
        command = shlex.join(["python", "-m", "experiments.fit", *sys.argv[1:]])
        content = {"origin": files.MARK, "schema": 1, "command": command}
        content |= {"versions": versions(), "rows": [row.as_json() for row in rows]}
        files.write_text(flags.json, json.dumps(content, indent=1) + "\n")
    faults = [row for row in failed if not row.is_refused]
    if faults:
        for row in faults:
            print(row.traceback, file=sys.stderr)
        fail(_failure(failed, len(rows)), code=1)
    if failed:
        raise ConfigError(_failure(failed, len(rows))) from failed[0].failure


def _failure(failed: Sequence, count: int) -> str:
    """Returns the last line, about failed rows; if there is a single row, it is the row's error."""
    if count == 1:
        only = failed[0]
        place = "" if only.infeasible else f"{only.config.remat} on {only.target}: "
        return f"{place}{only.error}"
    too_large = sum(row.infeasible is not None for row in failed)
    parts = []
    if too_large < len(failed):
        parts.append(f"{len(failed) - too_large} of {count} plans could not be compiled")
    if too_large:
        parts.append(f"for {too_large} of {count} no plan fits the budget")
    return "; ".join(parts)


def _cases(settings: TrainConfig, flags: FitFlags) -> list[tuple[TrainConfig, str]]:
    """Returns each plan's configuration with each target, checked before anything compiles."""
    configs = [dataclasses.replace(settings, remat=plan) for plan in flags.plan or PLANS]
    for config in configs:
        _ = config.plan  # raises PlanError
    found = [(config, target) for target in flags.target for config in configs]
    if len(set(found)) < len(found):
        raise PlanError("a plan or a target is given twice")
    return found


if __name__ == "__main__":
    main(fit)
