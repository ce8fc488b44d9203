"""The compiler's peak of a step, beside the peak that the runtime of a real GPU reports.

    python -m benchmarks.peaks --target h100 --output docs/measured/peaks_h100.json

A point is a plan, a batch size and a sequence length of Qwen3-0.6B's whole train step. Each point
is compiled for the chip as if it were absent, compiled for the present chip, and run in a fresh
process, whose allocator reports its peak. Exits with 1 if a bound fails: the present compiler's
peak is within 2 % at every point, the absent one's within 2 % in the median and 5 % at worst.
"""

import statistics
from pathlib import Path
from typing import Any

from benchmarks import cases
from benchmarks.cases import KEPT
from benchmarks.record import Record, finish, rows_of
from benchmarks.result import Row
from experiments.cli import main
from experiments.training.build import entry_of
from jaxckpt.absent.jobs import JobFailure, measure_many

POINTS = (
    *((plan, 8, 1024) for plan in ("none", KEPT, "dots_no_batch", "attention", "full")),
    *((plan, 8, 1024) for plan in ("uniform:4", "sqrt", "log", "14xfull/none")),
    *((plan, 2, 8192) for plan in ("attention", "full", "sqrt")),
    *(("full", 32, 1024), ("sqrt", 32, 1024)),
)
PRESENT, MEDIAN, WORST = 0.02, 0.02, 0.05


# A name in a row of `benchmarks.step_jax` -> its name here.
_NAMES = {"compiled_peak_bytes": "present_bytes", "estimated_seconds": "estimated"}
_NAMES |= {name: name for name in ("runtime_bytes", "seconds", "attention", "loss", "device")}
_NAMES |= {name: name for name in ("error", "traceback")}


def peaks(
    target: str = "h100",
    *,
    output: Path | None = None,
    tiny: bool = False,
):
    """Compare compiled and real peaks; exit with 1 if a bound fails.

    Args:
      target: The present chip; it is also compiled for as if it were absent.
      output: JSON file to write.
      tiny: A small model, on any device, to try the script.
    """
    names = ("plan", "batch_size", "seq_len")
    points: list[Row] = [dict(zip(names, point, strict=True)) for point in POINTS]
    small = lambda case: cases.tiny(case) | {"plan": case["plan"].replace("14x", "2x")}
    asked = [small(point) if tiny else point for point in points]
    configs = [cases.config_of(case, case["plan"]) for case in asked]
    absent = measure_many([(entry_of(config, target), target) for config in configs], parallel=6)
    rows: list[Row] = []
    record = Record("peaks", output, rows)
    for point, case, one in zip(points, asked, absent, strict=True):
        size = str(one) if isinstance(one, JobFailure) else one.peak_bytes
        *_, found = rows_of("step_jax", case)
        said = {here: found[name] for name, here in _NAMES.items() if name in found}
        rows.append(point | {"absent_bytes": size} | said)
        print(_line(rows[-1]), flush=True)
        record.save()
    finish(check(rows))


def _line(row: dict[str, Any]) -> str:
    start = f"{row['plan']:38} {row['batch_size']:>3} x {row['seq_len']:<6}"
    if "error" in row:
        return f"{start} {row['error']}"
    sizes = [row["absent_bytes"], row["present_bytes"], row["runtime_bytes"]]
    shown = "  ".join(f"{s / 2**30:7.3f}" if isinstance(s, int) else str(s)[:60] for s in sizes)
    return f"{start} {shown} GiB  {1e3 * row['seconds']:.1f} ms, {row['attention']}"


def check(rows: list[dict[str, Any]]) -> list[str]:
    """Returns a line for each bound that does not hold."""
    failures = [f"{row['plan']}: {row['error']}" for row in rows if "error" in row]
    rows = [row for row in rows if row.get("runtime_bytes")]
    if not rows:
        return [*failures, "no point has a runtime peak: this needs a GPU"]
    sizes = [(row["plan"], row["absent_bytes"]) for row in rows]
    failures += [f"{plan}: {size}" for plan, size in sizes if isinstance(size, str)]
    rows = [row for row in rows if isinstance(row["absent_bytes"], int)]
    off = lambda row, name: abs(row[name] / row["runtime_bytes"] - 1)
    for row in rows:
        if off(row, "present_bytes") > PRESENT:
            failures.append(f"{row['plan']}: present off by {off(row, 'present_bytes'):.2%}")
    away = [off(row, "absent_bytes") for row in rows]
    if away and statistics.median(away) > MEDIAN:
        failures.append(f"absent off by {statistics.median(away):.2%} in the median")
    if away and max(away) > WORST:
        failures.append(f"absent off by {max(away):.2%} at worst")
    return failures


if __name__ == "__main__":
    main(peaks, package="benchmarks")
