"""What the claims are held against: compiled rows, files of measured numbers, and small checks."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from experiments.claiming.cases import LARGE_CHIP, ROOT, plan_case
from experiments.config import ConfigError, TrainConfig
from experiments.reporting.groups import slope
from jaxckpt.plans import Plan
from jaxckpt.schedules.of_stage import stack_schedule_of

MEASURED = ROOT / "docs/measured"
_BF16_BYTES = 2


class MissingRow(KeyError):
    """A case that is not compiled yet: its name."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Numbers by what they are of.

    Attributes:
      rows: Compiled rows by case, as `numbers.compiled` returns them.
      checks: What `checks.run` returns.
      times: Rows of measured steps on a GPU that was there (`peaks_h100.json`).
      stacks: Compiled temporaries of a stack by length (`executor_cpu.json`).
    """

    rows: Mapping[str, Any]
    checks: Mapping[str, Any]
    times: tuple[Mapping[str, Any], ...]
    stacks: tuple[Mapping[str, Any], ...]

    def report(self, name: str) -> Mapping[str, Any]:
        """Returns the memory report of a case."""
        return self.row(name)["report"]

    def row(self, name: str) -> Mapping[str, Any]:
        """Returns the row of a case.

        Raises:
          MissingRow: It is not compiled yet.
        """
        if name not in self.rows:
            raise MissingRow(name)
        return self.rows[name]

    def check(self, name: str) -> Any:
        """Returns what a check found.

        Raises:
          MissingRow: It was not run yet.
        """
        if name not in self.checks:
            raise MissingRow(name)
        return self.checks[name]

    def of(self, model: str, chip: str, plan: str) -> Mapping[str, Any]:
        """Returns the memory report of a model under a plan."""
        return self.report(plan_case(model, chip, plan).name)

    def carry_bytes(self, model: str, chip: str = LARGE_CHIP) -> int:
        """Returns a: a block's input, [batch, sequence, width] in bfloat16."""
        config = config_of(model, chip)
        return config.batch_size * config.seq_len * config.model.d_model * _BF16_BYTES

    def residual_bytes(self, model: str, chip: str = LARGE_CHIP) -> float:
        """Returns R: what one more block costs without remat, from the compiled steps.

        `none` holds L R + a, `full` (L - 1) a + R + a, so the difference is (L - 1) (R - a).
        """
        blocks = config_of(model, chip).model.num_blocks
        none, full = (self.of(model, chip, plan)["peak_bytes"] for plan in ("none", "full"))
        return self.carry_bytes(model, chip) + (none - full) / (blocks - 1)

    def stack_bytes(self, plan: str, blocks: int) -> int:
        """Returns the temporaries of a stack of so many blocks, compiled for this CPU."""
        return dict(self._stack(plan))[blocks]

    def stack_slope(self, plan: str) -> float:
        """Returns the slope of log temporaries over log L of a stack compiled for this CPU."""
        return slope(*zip(*self._stack(plan), strict=True))

    def _stack(self, plan: str) -> list[tuple[int, int]]:
        return sorted(
            (row["L"], row["temp_bytes"])
            for row in self.stacks
            if row["plan"] == plan and row["target"].startswith("cpu")
        )

    def seconds(self, plan: str, batch: int = 8, tokens: int = 1024) -> float:
        """Returns the measured seconds of a step of Qwen3-0.6B's shape on one H100."""
        for row in self.times:
            if (row["plan"], row["batch_size"], row["seq_len"]) == (plan, batch, tokens):
                return row["seconds"]
        raise ConfigError(f"peaks_h100.json has no time of {plan}, {batch} x {tokens}")


def config_of(model: str, chip: str) -> TrainConfig:
    """Returns the configuration of a model on a chip, under some plan."""
    return plan_case(model, chip, "full").config


def gather(rows: Mapping[str, Any], checks: Mapping[str, Any]) -> Evidence:
    """Returns the evidence: rows and checks, and what lies in `docs/measured`."""
    read = lambda name: json.loads((MEASURED / name).read_text(encoding="utf-8"))
    stacks = read("executor_cpu.json")["parts"]["temp"]["rows"]
    times = read("peaks_h100.json")["rows"]
    return Evidence(rows=rows, checks=checks, times=tuple(times), stacks=tuple(stacks))


def recomputed(report: Mapping[str, Any]) -> float:
    """Returns the FLOPs run again, as a share of those without remat."""
    return report["recomputed_flops"] / (report["flops"] - report["recomputed_flops"])


def extra_forwards(plan: str, blocks: int) -> int:
    """Returns the block forwards that a stack runs again under a plan of one stage."""
    schedule = stack_schedule_of(Plan.parse(plan).bind(blocks).stages[0])
    assert schedule is not None, plan
    return schedule.extra_forwards


def gb(size: float) -> str:
    """Returns bytes in 1e9, as the claims count them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def gib(size: float) -> str:
    """Returns bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"


def percent(share: float) -> str:
    """Returns a share as text."""
    return f"{100 * share:.1f} %"


def log2(blocks: int) -> int:
    """Returns log2 L, rounded up."""
    return math.ceil(math.log2(blocks))
