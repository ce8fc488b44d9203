"""The compiled numbers behind the claims, in a JSON file. Rows in the file are not recompiled."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.claiming.cases import PACKAGES, Case
from experiments.config import ConfigError
from experiments.files import commit, versions, write_text
from experiments.fitting.measuring import check_targets, measure_all
from jaxckpt.units import iec

_KEPT_BUFFERS = 5
_COMMAND = "python -m experiments.claims"


def kept(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the rows and checks that a file holds; nothing is compiled."""
    found = _read(path)
    return found["rows"], found["checks"]


def compiled(cases: Sequence[Case], path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns the row of every case by its name; missing ones are compiled and written down.

    Raises:
      ConfigError: The file holds something else, or a case failed.
      Unavailable: The compiler for a missing row is not installed.
    """
    rows = _read(path)["rows"]
    missing = [case for case in cases if rows.get(case.name, {}).get("key") != case.key]
    check_targets(sorted({case.target for case in missing}))
    failed = []
    for number, case in enumerate(missing, start=1):
        (row,) = measure_all([(case.config, case.target)], parallel=1)
        found = row.error or f"peak {iec(row.measured.peak_bytes)}"
        say(f"{number}/{len(missing)}  {case.name} on {case.target}: {found}")
        if row.error is not None:
            failed.append((f"{case.name}: {row.error}", row))
            continue
        rows[case.name] = _row(case, row)
        # Rows keep the order of the cases, so that a diff of the file shows numbers alone.
        rows = {one.name: rows[one.name] for one in cases if one.name in rows}
        _write(path, {"rows": rows})
    faults = [row.failure for _, row in failed if row.failure and not row.is_refused]
    if faults:
        raise faults[0]
    if failed:
        raise ConfigError(
            f"{len(failed)} of {len(cases)} cases could not be compiled, the others are kept in "
            f"{path}; the first: {failed[0][0]}"
        )
    return rows


def checked(path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns the results of `checks.run`, which runs only if the file does not hold them."""
    held = _read(path)["checks"]
    if not held:
        from experiments.claiming import checks  # it imports JAX

        say("checking gradients under dropout, and counting parameters")
        held = {"versions": versions(PACKAGES), **checks.run()}
        _write(path, {"checks": held})
    return held


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"rows": {}, "checks": {}}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["command"] != _COMMAND:  # another command's file is never overwritten
            raise ValueError
        return {part: dict(content.get(part, {})) for part in ("rows", "checks")}
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        raise ConfigError(
            f"{str(path)!r} does not hold the numbers of claims; remove it to compile them again"
        ) from None


def _write(path: Path, changes: dict[str, Any]):
    content = {"command": _COMMAND, **_read(path), **changes}
    write_text(path, json.dumps(content, indent=1) + "\n")


def _row(case: Case, row) -> dict[str, Any]:
    report = row.report.as_json()
    # Only a file's name and its folder: paths of the machine that compiled stay private.
    report["buffers"] = [
        one | {"source": "/".join(one["source"].split("/")[-2:])}
        for one in report["buffers"][:_KEPT_BUFFERS]
    ]
    return {
        "key": case.key,
        "target": case.target,
        "plan": row.config.remat,
        "versions": versions(PACKAGES),
        "commit": commit(),
        "report": report,
    }
