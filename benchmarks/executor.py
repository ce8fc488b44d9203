"""Every result of the schedule executor: tables on the terminal, JSON on request.

    python -m benchmarks.executor --output docs/measured/executor_cpu.json
    python -m benchmarks.executor --part nested --tokens 8192 --width 1024 --blocks 28 --dtype bf16

Exits with 1 if a bound fails, and prints a line for each failed bound.
"""

import importlib.util
import os
import time
from pathlib import Path
from typing import Literal, get_args

from benchmarks.cases import Shape
from benchmarks.record import device, origin, write, write_section
from benchmarks.result import Result, console
from experiments.cli import main
from experiments.config import ConfigError

Part = Literal["equality", "evaluations", "temp", "nested", "compile", "copies"]
PARTS: tuple[str, ...] = get_args(Part)


def executor(
    shape: Shape = Shape(),
    *,
    output: Path | None = None,
    part: Part | None = None,
    quick: bool = False,
    write_docs: bool = False,
):
    """Print every result of the schedule executor; exit with 1 if a bound fails.

    Args:
      shape: The stack of the part `nested`.
      output: JSON file to write.
      part: Run only this part.
      quick: Run small forms of all parts, which takes seconds.
      write_docs: Put the table of `temp` into docs/theory.md.
    """
    if write_docs and (part not in (None, "temp") or quick):
        valid = "--part temp, no --quick"
        raise ConfigError(f"--write-docs writes the whole table of temp; valid: {valid}")
    _prepare()
    terminal = console(160)
    record = origin("executor", device()) | {"quick": quick, "parts": {}}  # imports JAX
    versions = " ".join(f"{name} {version}" for name, version in record["versions"].items())
    terminal.print(f"{record['device']}, {versions}\n", markup=False)
    failures = []
    for name in PARTS if part is None else (part,):
        start = time.perf_counter()
        module = importlib.import_module(f"benchmarks.executor_parts.{name}")
        result: Result = module.run(quick, *([shape] if name == "nested" else []))
        result.print(terminal)
        seconds = round(time.perf_counter() - start, 1)
        record["parts"][name] = result.as_json() | {"seconds": seconds}
        failures += result.failures
        if name == "temp" and write_docs:
            write_section(result, record)
        record["failures"] = failures
        write(record, output)  # after every part, so that an interrupted run leaves a record
    verdict = f"{len(failures)} bounds failed" if failures else "every bound holds"
    terminal.print("\n".join([verdict, *failures]), markup=False)
    raise SystemExit(bool(failures))


def _prepare():
    """Sets JAX's platform to the CPU on a machine without a chip, before JAX is imported.

    JAX loads an installed libtpu or CUDA plugin even where there is no such chip, and then fails.
    """
    is_there = lambda module: importlib.util.find_spec(module) is not None
    chips = any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0", "/dev/nvidia0")))
    if not chips and (is_there("libtpu") or is_there("jax_plugins")):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


if __name__ == "__main__":
    main(executor, package="benchmarks")
