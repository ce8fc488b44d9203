"""Finding rows: folders of sweeps and runs in, points out; every skipped row is named."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments import files
from experiments.config import ConfigError
from experiments.reporting.points import Point, PointError, point_of_row, point_of_run
from experiments.sweeping.running import ROWS
from experiments.training.record import METRICS
from jaxckpt.plans.errors import nearest

CURE = "python -m experiments.sweep -o sweeps/small makes some"


@dataclasses.dataclass
class Found:
    """The rows that were read.

    Attributes:
      points: Rows that can be shown.
      failed: `(what, error)` of rows that a sweep could not run.
      skipped: A line for each file or row that cannot be shown, and why.
    """

    points: list[Point] = dataclasses.field(default_factory=list)
    failed: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)


def read_all(paths: Sequence[Path]) -> Found:
    """Returns the points of sweeps and runs.

    Args:
      paths: Folders of sweeps (`rows.jsonl`), of runs (`metrics.jsonl`), folders of such folders,
        or such files.

    Raises:
      ConfigError: There is no such path, or nothing in any of them can be shown.
    """
    found = Found()
    for path in paths:
        files = list(_files(path))
        if not files:
            found.skipped.append(f"{path} holds no rows of a sweep and no run")
        for file in files:
            _read(file, found)
    if not found.points:
        reasons = "; ".join(found.skipped[:3] or [f"all {len(found.failed)} rows failed"])
        more = f"; and {len(found.skipped) - 3} more" if len(found.skipped) > 3 else ""
        raise ConfigError(f"nothing to show: {reasons}{more}; {CURE}")
    return found


def _files(path: Path) -> Iterator[Path]:
    """Yields the files to read; the runs inside a sweep's folder are not read, its rows are."""
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        beside = path.parent if path.parent.is_dir() else Path()
        names = sorted(str(one) for one in beside.iterdir() if one.is_dir())
        raise ConfigError(f"there is no {str(path)!r}{nearest(str(path), names)}; {CURE}")
    for folder in (path, *sorted(one for one in path.iterdir() if one.is_dir())):
        for name in (ROWS, METRICS):
            if (folder / name).is_file():
                yield folder / name
                break
        else:
            continue
        if folder == path:
            return


def _read(file: Path, found: Found):
    try:
        rows, broken = files.read(file)
    except OSError as error:
        found.skipped.append(f"{file}: {error.strerror}")
        return
    if broken:
        numbers = ", ".join(map(str, broken[:5])) + ", ..." * (len(broken) > 5)
        which = f"line {numbers} is" if len(broken) == 1 else f"lines {numbers} are"
        found.skipped.append(f"{file}: {which} no JSON object ({len(broken)} skipped)")
    if not rows:
        found.skipped.append(f"{file} has no other line" if broken else f"{file} is empty")
    elif file.name == ROWS or "key" in rows[0]:
        _read_sweep(file, rows, found)
    else:
        try:
            found.points.append(point_of_run(rows))
        except PointError as error:
            found.skipped.append(f"{file}: {error}")


def _read_sweep(file: Path, rows: list[dict], found: Found):
    latest = {str(row.get("key", number)): row for number, row in enumerate(rows)}
    for number, row in enumerate(latest.values(), start=1):
        if "error" in row:
            what = ", ".join(str(row.get(name)) for name in ("plan", "depth", "target"))
            found.failed.append((what, str(row["error"])))
            continue
        try:
            found.points.append(point_of_row(row))
        except PointError as error:
            found.skipped.append(f"{file}: row {number}: {error}")
