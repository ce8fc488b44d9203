"""The evidence for and against claims, by the names that `docs/claims.md.in` uses."""

import dataclasses
import json
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from experiments.claiming.cases import EXAMPLE, LARGE_CHIP, ROOT, plan_case
from experiments.config import ConfigError, TrainConfig
from experiments.reporting.groups import slope
from jaxckpt.plans import Plan
from jaxckpt.schedules.of_stage import stack_schedule_of

_MEASURED = ROOT / "docs/measured"


class MissingRow(KeyError):
    """A case that is not compiled yet: its name."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The numbers that claims are compared with.

    Attributes:
      rows: Compiled rows by case, as `numbers.compiled` returns them.
      checks: The results of `checks.run`.
      times: Rows of steps that were timed on a GPU (`peaks_h100.json`).
      stacks: Compiled temporaries of a stack by length (`executor_cpu.json`).
    """

    rows: Mapping[str, Any]
    checks: Mapping[str, Any]
    times: tuple[Mapping[str, Any], ...]
    stacks: tuple[Mapping[str, Any], ...]

    def case(self, name: str) -> Any:
        """Returns the memory report of a case, with three more fields.

        `plan` is the plan's text, `fits` whether the step fits its chip, `again` the recomputed
        FLOPs as a share of the FLOPs without remat.

        Raises:
          MissingRow: The case is not compiled yet.
        """
        row = _found(self.rows, name)
        report = SimpleNamespace(**row["report"], plan=row["plan"])
        report.again = report.recomputed_flops / (report.flops - report.recomputed_flops)
        report.fits = report.usable_bytes is None or report.peak_bytes <= report.usable_bytes
        return report

    def of(self, plan: str, chip: str = LARGE_CHIP, model: str = EXAMPLE) -> Any:
        """Returns what `case` returns for a model under a plan."""
        return self.case(plan_case(model, chip, plan).name)

    def check(self, name: str) -> Any:
        """Returns the result of a check; raises `MissingRow` if it was not run yet."""
        return _found(self.checks, name)

    def config(self, model: str = EXAMPLE, chip: str = LARGE_CHIP) -> TrainConfig:
        """Returns the configuration of a model on a chip, under some plan."""
        return plan_case(model, chip, "full").config

    def input_bytes(self, model: str = EXAMPLE) -> int:
        """Returns a, the bytes of a block's input [batch, sequence, width] in bfloat16."""
        config = self.config(model)
        return config.batch_size * config.seq_len * config.model.d_model * 2

    def residual_bytes(self, chip: str = LARGE_CHIP, model: str = EXAMPLE) -> float:
        """Returns R, the bytes that one more block takes without remat, from the compiled steps.

        `none` holds L R + a, `full` (L - 1) a + R + a, so the difference is (L - 1) (R - a).
        """
        none, full = (self.of(plan, chip, model).peak_bytes for plan in ("none", "full"))
        blocks = self.config(model, chip).model.num_blocks
        return self.input_bytes(model) + (none - full) / (blocks - 1)

    def reruns(self, plan: str) -> int:
        """Returns the number of blocks that the example recomputes under a plan of one stage."""
        blocks = self.config().model.num_blocks
        schedule = stack_schedule_of(Plan.parse(plan).bind(blocks).stages[0])
        assert schedule is not None, plan
        return schedule.extra_forwards

    def stack_bytes(self, plan: str) -> dict[int, int]:
        """Returns the temporaries of stacks by their number of blocks, compiled for this CPU."""
        mine = [row for row in self.stacks if row["plan"] == plan]
        found = {row["L"]: row["temp_bytes"] for row in mine if row["target"].startswith("cpu")}
        return dict(sorted(found.items()))

    def stack_slope(self, plan: str) -> float:
        """Returns the slope of log temporaries over log L."""
        return slope(*zip(*self.stack_bytes(plan).items(), strict=True))

    def seconds(self, plan: str) -> float:
        """Returns the measured seconds of a step of Qwen3-0.6B's shape on one H100."""
        for row in self.times:
            if (row["plan"], row["batch_size"], row["seq_len"]) == (plan, 8, 1024):
                return row["seconds"]
        raise ConfigError(f"peaks_h100.json has no time of {plan}, 8 x 1024")

    def fastest_seconds(self) -> float:
        """Returns the measured seconds of the fastest plan, at eight sequences."""
        return min(row["seconds"] for row in self.times if row["batch_size"] == 8)


def _found(held: Mapping[str, Any], name: str) -> Any:
    if name not in held:
        raise MissingRow(name)
    return held[name]


def gather(rows: Mapping[str, Any], checks: Mapping[str, Any]) -> Evidence:
    """Returns the evidence: rows and checks, and the records in `docs/measured`."""
    read = lambda name: json.loads((_MEASURED / name).read_text(encoding="utf-8"))
    stacks = read("executor_cpu.json")["parts"]["temp"]["rows"]
    times = read("peaks_h100.json")["rows"]
    return Evidence(rows=rows, checks=checks, times=tuple(times), stacks=tuple(stacks))


gib = lambda size: f"{size / 2**30:.2f} GiB"
percent = lambda share: f"{100 * share:.1f} %"
# Claims count in units of 1e9 bytes.
gb = lambda size: f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
FORMATS = {"gb": gb, "gib": gib, "percent": percent, "log2": math.log2}
