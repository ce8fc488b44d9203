"""JSON Lines that a killed process may have torn: what can be read, and how much cannot."""

import dataclasses
import json
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """What a file holds.

    Attributes:
      rows: The objects, in order.
      broken: Numbers of the lines that are no JSON object, from 1.
    """

    rows: tuple[dict[str, Any], ...]
    broken: tuple[int, ...]


def read(path: Path) -> Lines:
    """Returns the objects of a file, and which lines are none; empty lines are skipped.

    Raises:
      OSError: It cannot be read.
    """
    rows, broken = [], []
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            # NaN and Infinity are no JSON, and a browser would not read them.
            row = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(number)
    return Lines(rows=tuple(rows), broken=tuple(broken))


def _refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")
