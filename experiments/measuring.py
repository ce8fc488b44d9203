"""Measuring configurations for targets, several at once, under a progress bar."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.build import build, entry_of
from experiments.config import TrainConfig
from experiments.largest import largest_that_fits
from jaxckpt.memory import launch
from jaxckpt.memory.absent import measure_entry
from jaxckpt.memory.report import MemoryReport
from jaxckpt.memory.targets import parse_target

# A sequence grows by whole blocks of the attention kernels.
_SEQUENCE_UNIT = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitRow:
    """One plan on one target.

    Attributes:
      config: What was compiled.
      target: For what.
      report: Its memory; None where it came to nothing.
      error: Why it did, in one line.
      size: With `--max`, the largest size that fits, 0 if none does.
    """

    config: TrainConfig
    target: str
    report: MemoryReport | None = None
    error: str | None = None
    size: int | None = None

    @property
    def recomputed(self) -> float | None:
        """FLOPs run again, as a share of those without remat."""
        again = self.report.recomputed_flops
        return None if again is None else again / (self.report.flops - again)

    def as_json(self) -> dict[str, Any]:
        """Returns the row as JSON values."""
        found = {"plan": self.config.remat, "target": self.target}
        found |= {"batch_size": self.config.batch_size, "seq_len": self.config.seq_len}
        if self.size is not None:
            found["largest"] = self.size
        if self.report is None:
            return found | {"error": self.error}
        report = self.report
        return found | {
            "peak_bytes": report.peak_bytes,
            "host_bytes": report.host_bytes,
            "usable_bytes": report.usable_bytes,
            "fits": report.fits,
            "flops": report.flops,
            "recomputed_flops": report.recomputed_flops,
            "step_seconds": report.estimated_seconds,
            "compile_seconds": report.compile_seconds,
            "findings": list(report.findings),
            "source": report.source,
            "jax_version": report.jax_version,
        }


def check_targets(targets: Sequence[str]):
    """Raises for a target that does not exist, or whose compiler is not installed.

    Raises:
      TargetError, Unavailable: In one line, before anything is compiled.
    """
    for target in map(parse_target, targets):
        if target.backend != "local":
            launch.check_available(target)


def measure_all(
    cases: Sequence[tuple[TrainConfig, str]], *, largest: str | None = None, parallel: int = 2
) -> list[FitRow]:
    """Returns a row for each configuration and target, in their order.

    Args:
      cases: Configurations and targets.
      largest: `"batch-size"` or `"seq-len"` to find the largest that fits; None for what is given.
      parallel: Compilations at once. Those for `local` are made one after another, in this process.
    """
    here = threading.Lock()  # JAX's tracing of one step does not gain from another's beside it
    columns = (TextColumn("compiling"), BarColumn(bar_width=20))
    columns += (TextColumn("{task.completed}/{task.total}  {task.fields[last]}"),)
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("compile", total=len(cases), last="")

        def one(case: tuple[TrainConfig, str]) -> FitRow:
            config, target = case
            row = _row(config, target, largest, here)
            progress.update(task, advance=1, last=f"{config.remat} on {target}")
            return row

        with ThreadPoolExecutor(parallel) as pool:
            return list(pool.map(one, cases))


def _row(config: TrainConfig, target: str, largest: str | None, here) -> FitRow:
    try:
        if largest is None:
            return FitRow(config=config, target=target, report=_measure(config, target, here))
        return _largest_row(config, target, largest, here)
    except Exception as error:  # whatever it is, it is this row's and no other's
        line = " ".join(str(error).split()) or type(error).__name__
        return FitRow(config=config, target=target, error=line)


def _measure(config: TrainConfig, target: str, here) -> MemoryReport:
    if parse_target(target).backend != "local":
        return measure_entry(entry_of(config, target), target)
    from jaxckpt.memory.measure import compile_step

    with here:
        return compile_step(build(config, target))[1]


def _largest_row(config: TrainConfig, target: str, largest: str, here) -> FitRow:
    """Returns the row of the largest size that fits, verified on both sides by compiling."""
    field = largest.replace("-", "_")
    unit = config.accumulate if field == "batch_size" else _SEQUENCE_UNIT
    reports: dict[int, MemoryReport] = {}
    sized: Callable[[int], TrainConfig] = lambda size: dataclasses.replace(config, **{field: size})

    def peak(count: int) -> tuple[int, int | None]:
        reports[count] = report = _measure(sized(count * unit), target, here)
        return report.peak_bytes, report.usable_bytes

    count = largest_that_fits(peak, start=max(1, getattr(config, field) // unit))
    shown = max(count, 1)  # where nothing fits, the least size says by how much
    return FitRow(
        config=sized(shown * unit), target=target, report=reports[shown], size=count * unit
    )
