"""A part of a benchmark in a fresh process: what it prints as lines of JSON, as it prints them."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any


def values_of(module: str, *asked: Any, environment: Mapping[str, str], name: str) -> Iterator[Any]:
    """Yields what `python -m benchmarks.MODULE` prints, a JSON value a line.

    Args:
      module: Of benchmarks.
      *asked: Its arguments, as JSON.
      environment: Of the process.
      name: What the process is about, for an error.

    Raises:
      RuntimeError: The process failed; with the last line that it wrote about it.
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
            lines = [line for line in log.read().splitlines() if _says_something(line)]
            raise RuntimeError(f"{name}: {(lines or [f'exit code {process.returncode}'])[-1]}")


def _says_something(line: str) -> bool:
    """Whether a line is no rule, and not what JAX adds below an error's own text."""
    return bool(line.strip(" -")) and not line.startswith("For simplicity, JAX has removed")
