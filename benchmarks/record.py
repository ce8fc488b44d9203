"""A benchmark's record on disk: JSON, whole or not at all. Imports no JAX."""

import json
from pathlib import Path
from typing import Any


def write(record: dict[str, Any], path: Path | None):
    """Writes the record as JSON; without a path, nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)
