"""Will it fit? Compile the train step for chips that need not be there, under several plans.

python -m experiments.fit --config configs/qwen3_0p6b.toml --target v5e-1 --plan none --plan sqrt
python -m experiments.fit --config configs/qwen3_0p6b.toml --target h100 --plan full --max batch-size
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from experiments.cli import fail, main
from experiments.config import ConfigError, TrainConfig
from jaxckpt.plans import PlanError

# From the fastest and largest to the smallest; each is a way of spending memory that users know.
PLANS = ("none", "dots_no_batch", "full+attention+names:q,k,v,mid,gate,up")
PLANS += ("attention", "full", "sqrt", "log")


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FitFlags:
    """What is asked about a configuration.

    Attributes:
      target: A chip, present (local) or not (v5e-1, h100, ...); may be given several times.
      plan: A checkpointing plan; may be given several times. By default a sensible set.
      max: Find the largest batch-size or seq-len that fits, for each plan and target.
      json: File for the rows.
      parallel: Compilations at once, each in a process of its own.
    """

    target: Annotated[tuple[str, ...], Parameter(negative="")] = ("local",)
    plan: Annotated[tuple[str, ...], Parameter(negative="")] = PLANS
    max: Literal["batch-size", "seq-len"] | None = None
    json: Path | None = None
    parallel: int = 2

    def __post_init__(self):
        if self.parallel < 1:
            raise ConfigError(f"parallel is {self.parallel}; the least is 1")
        if self.json is not None and not self.json.parent.is_dir():
            raise ConfigError(f"--json {str(self.json)!r}: there is no folder {self.json.parent}")


def fit(
    flags: FitFlags = FitFlags(),
    settings: TrainConfig = TrainConfig(),
    *,
    config: Annotated[Path | None, Parameter(help="TOML file with any of the settings.")] = None,
):
    """Compile the train step under plans and for targets; print which fit and how fast they are."""
    del config  # read before the other flags were parsed; see experiments.cli
    from experiments import fit_table
    from experiments.init import check_shape
    from experiments.measuring import check_targets, measure_all

    check_shape(settings)
    cases = _cases(settings, flags)
    check_targets(flags.target)
    rows = measure_all(cases, largest=flags.max, parallel=flags.parallel)
    fit_table.show(rows, settings, flags.max)
    if settings.explain:
        _explain(cases)
    if flags.json is not None:
        flags.json.write_text(
            json.dumps({"rows": [row.as_json() for row in rows]}, indent=1) + "\n"
        )
    failed = [row for row in rows if row.error is not None]
    if failed:
        fail(f"{len(failed)} of {len(rows)} plans could not be compiled", code=2)


def _cases(settings: TrainConfig, flags: FitFlags) -> list[tuple[TrainConfig, str]]:
    """Returns each plan's configuration with each target, checked before anything compiles."""
    found = []
    for target in flags.target:
        for plan in flags.plan:
            config = dataclasses.replace(settings, remat=plan)
            config.plan  # raises PlanError
            found.append((config, target))
    if len(set(found)) < len(found):
        raise PlanError("a plan or a target is given twice")
    return found


def _explain(cases: list[tuple[TrainConfig, str]]):
    """Prints a table of one block's residuals for each stage of each plan."""
    from experiments.build import build
    from experiments.plan_checks import explained

    target = cases[0][1]
    for config in (config for config, where in cases if where == target):
        for text in explained(build(config, target)):
            print(f"\n{text}")


if __name__ == "__main__":
    main(fit)
