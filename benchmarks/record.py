"""A benchmark's record: where it comes from, its parts in processes, and where it is written.

`values_of` yields what a part in a fresh process prints as lines of JSON, as it prints them.
`origin` is the command, the commit, versions and the device. `write` puts the record on disk whole,
`write_section` its table into docs/theory.md between two markers. JAX is imported for the device
alone.
"""

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.result import Result, markdown
from experiments.provenance import ROOT, commit, versions


def write(record: dict[str, Any], path: Path | None):
    """Writes the record as JSON; without a path, nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


class ChildError(RuntimeError):
    """A process that failed: the last line that it wrote, and all of it as `text`."""

    def __init__(self, line: str, text: str):
        super().__init__(line)
        self.text = text


def values_of(module: str, *asked: Any, environment: Mapping[str, str], name: str) -> Iterator[Any]:
    """Yields what `python -m benchmarks.MODULE` prints, a JSON value a line.

    Args:
      module: Of benchmarks.
      *asked: Its arguments, as JSON.
      environment: Of the process.
      name: What the process is about, for an error.

    Raises:
      ChildError: The process failed.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(json.dumps, asked)]
    # The compilers write banners that mean nothing to file descriptor 2.
    with tempfile.TemporaryFile("w+") as log:
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
        with subprocess.Popen(command, env=environment, **streams) as process:
            assert process.stdout is not None  # a pipe
            try:
                yield from map(json.loads, process.stdout)
            except GeneratorExit:
                process.kill()
                raise
        if process.returncode:
            log.seek(0)
            text = log.read()
            lines = [line for line in text.splitlines() if _says_something(line)]
            last = (lines or [f"exit code {process.returncode}"])[-1]
            raise ChildError(f"{name}: {last}", text)


def _says_something(line: str) -> bool:
    """Whether a line is no rule, and not what JAX adds below an error's own text."""
    return bool(line.strip(" -")) and not line.startswith("For simplicity, JAX has removed")


_PACKAGES = ("jaxckpt", "jax", "jaxlib", "flax", "libtpu")


def origin(command: str) -> dict[str, Any]:
    """Returns the command, the commit ("unknown" outside a checkout), versions and the device."""
    import jax  # by who has chosen its platform

    return {
        "command": command,
        "commit": commit(),
        "versions": versions(_PACKAGES),
        "backend": jax.default_backend(),
        "device": device(),
    }


def device() -> str:
    """Returns the first device as text, such as `"cpu (x86_64)"` or `"gpu (NVIDIA H200)"`."""
    import jax

    first = jax.devices()[0]
    kind = platform.machine() if first.platform == "cpu" else first.device_kind
    return f"{first.platform} ({kind})"


PATH = ROOT / "docs" / "theory.md"
BEGIN, END = "<!-- begin: made by a command -->", "<!-- end: made by a command -->"


def write_section(result: Result, record: dict[str, Any], path: Path = PATH):
    """Replaces what stands between the markers by the result's table and where it comes from."""
    before, rest = path.read_text().split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n{section(result, record)}\n{END}{after}")


def section(result: Result, record: dict[str, Any]) -> str:
    """Returns the table as Markdown under its command, commit, versions and device."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"Made by `{record['command']}` on {record['device']}, {versions}.", ""]
    lines += [markdown(result.table or result.rows)]
    lines += [f"\nNot compiled here: {note}." for note in result.notes]
    return "\n".join(lines)
