"""The rows of a sweep on disk: `rows.jsonl`, one object a line, whole once it is written."""

import json
import os
from pathlib import Path
from typing import Any

from experiments import files
from experiments.config import RunError
from experiments.files import reason, write_whole

ROWS = "rows.jsonl"


class Rows:
    """Rows by key; a later row of a key takes the place of an earlier one.

    Attributes:
      path: The file.
    """

    def __init__(self, folder: Path):
        """Reads what the folder holds; a line that a killed sweep tore is cut off.

        Raises:
          RunError: The folder cannot be read or written.
        """
        self.path = folder / ROWS
        self._rows: dict[str, dict[str, Any]] = {}
        try:
            if self.path.exists():
                found = files.read(self.path)
                self._rows = {str(row.get("key")): row for row in found.rows}
                text = "".join(map(_line, self._rows.values()))
                write_whole(self.path, text)
        except OSError as error:
            raise RunError(f"cannot write to {folder}: {reason(error)}") from None

    def done(self, key: str) -> bool:
        """Whether there is a row of that key which did not fail."""
        return "error" not in self._rows.get(key, {"error": "missing"})

    def add(self, row: dict[str, Any]):
        """Appends a row; it is on disk when this returns.

        Raises:
          RunError: The disk is full, say.
        """
        self._rows[row["key"]] = row
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {reason(error)}") from None


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
