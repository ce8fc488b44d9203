"""A part of a benchmark in a fresh process: what it prints as lines of JSON, as it prints them."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any


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
