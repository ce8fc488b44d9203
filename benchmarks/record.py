"""A benchmark's record: rows from processes, where they come from, and where they are written.

`rows_of` runs a module in a fresh process and yields the rows that it prints as lines of JSON. A
`Record` is written whole after every row, and `kept` reads the rows of an interrupted run. `origin`
is the command, the commit, the versions and the device. `write_section` puts a table into
docs/theory.md between two markers. Only `device` imports JAX: a process that has initialized JAX
holds the chip, and another process cannot have it.
"""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.result import Result, Row, markdown
from experiments.files import ROOT, commit, versions, write_text


@dataclasses.dataclass
class Record:
    """The rows of a benchmark, and the file that holds them.

    Attributes:
      benchmark: The benchmark's module, without `benchmarks.`.
      output: The file; None to write nothing.
      rows: A list of rows, or a dict of rows by name.
    """

    benchmark: str
    output: Path | None
    rows: Any

    def save(self, device: str = "none", **about: Any):
        """Writes the rows to the file, if any; `device` is recorded if no row names a device."""
        rows = self.rows.values() if isinstance(self.rows, dict) else self.rows
        found = next((row["device"] for row in rows if row.get("device")), device)
        write(origin(self.benchmark, found) | about | {"rows": self.rows}, self.output)


def kept(output: Path | None) -> Any:
    """Returns the rows in the file, such as those of an interrupted run; None without a file."""
    if output is None or not output.exists():
        return None
    return json.loads(output.read_text(encoding="utf-8"))["rows"]


def write(record: dict[str, Any], path: Path | None):
    """Writes a record as JSON; without a path, nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=1) + "\n")


def finish(failures: list[str]) -> NoReturn:
    """Prints the bounds that failed, and ends the command: with exit code 1 if there are any."""
    print("\n".join(failures) or "every bound holds")
    sys.exit(bool(failures))


def with_flags(options: str) -> dict[str, str]:
    """Returns this process's environment with more options in `XLA_FLAGS`."""
    return os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {options}".strip()}


def rows_of(
    module: str, *asked: Any, environment: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """Yields the rows that `python -m benchmarks.MODULE` prints, one JSON object per line.

    If the process fails, the last row has an `error`, the last line that the process wrote, and
    the whole `traceback`.

    Args:
      module: A module of benchmarks.
      *asked: The module's arguments; the process gets them as JSON.
      environment: The environment of the process; this process's by default.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(json.dumps, asked)]
    # Compilers write banners to file descriptor 2; they are read only after a failure.
    with tempfile.TemporaryFile("w+") as log:
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
        with subprocess.Popen(command, env=environment, **streams) as process:
            assert process.stdout is not None  # a pipe
            try:
                yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
            except BaseException:  # the reader has stopped
                process.kill()
                raise
        if process.returncode:
            log.seek(0)
            text = log.read()
            lines = [line for line in text.splitlines() if _says_something(line)]
            last = (lines or [f"exit code {process.returncode}"])[-1]
            yield {"error": last, "traceback": text}


def _says_something(line: str) -> bool:
    """Whether a line is neither blank or dashes nor the note that JAX adds below an error."""
    return bool(line.strip(" -")) and not line.startswith("For simplicity, JAX has removed")


_PACKAGES = ("jaxckpt", "jax", "jaxlib", "flax", "libtpu")


def origin(benchmark: str, device: str) -> dict[str, Any]:
    """Returns the command, the commit ("unknown" outside a checkout), versions and the device."""
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(_PACKAGES),
        "backend": device.partition(" ")[0],
        "device": device,
    }


HOST = f"cpu ({platform.machine()})"


def device() -> str:
    """Returns the first device as text, such as `"cpu (x86_64)"` or `"gpu (NVIDIA H200)"`."""
    import jax

    first = jax.devices()[0]
    return HOST if first.platform == "cpu" else f"{first.platform} ({first.device_kind})"


PATH = ROOT / "docs" / "theory.md"
BEGIN, END = "<!-- begin: made by a command -->", "<!-- end: made by a command -->"


def write_section(result: Result, record: dict[str, Any], path: Path = PATH):
    """Replaces the text between the markers by the result's table and its origin."""
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
