"""Every result of the schedule executor: tables on the terminal, JSON on request.

    python -m benchmarks.executor --output docs/measured/executor_cpu.json
    python -m benchmarks.executor --part nested --tokens 8192 --width 1024 --blocks 28 --dtype bf16

Exits with 1 if any bound fails, and prints each that does in one line.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from benchmarks.executor_parts import absent
from benchmarks.record import write
from experiments.cli import fail
from experiments.config import ConfigError

PARTS = ("equality", "evaluations", "temp", "nested", "compile", "copies")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line.

    Attributes:
      output: JSON file to write.
      part: Run one part alone.
      quick: Run small forms of all parts, in seconds.
      write_docs: Put the table of `temp` into docs/theory.md.
      tokens: `nested`: tokens in a batch.
      width: `nested`: width of the stack, a multiple of 128.
      blocks: `nested`: number of blocks.
      dtype: `nested`: dtype of the computation.
      sequence: `nested`: tokens in a sequence.
      pairs: `nested`: timed pairs.
    """

    output: Path | None = None
    part: Literal["equality", "evaluations", "temp", "nested", "compile", "copies"] | None = None
    quick: Annotated[bool, Parameter(negative=())] = False
    write_docs: Annotated[bool, Parameter(negative=())] = False
    tokens: int = 1024
    width: int = 256
    blocks: int = 16
    dtype: Literal["f32", "bf16"] = "f32"
    sequence: int = 256
    pairs: int = 7


def executor(flags: Annotated[Flags, Parameter(name="*")] = Flags(), *, command: str = ""):
    """Print every result of the schedule executor; exit with 1 if a bound fails."""
    absent.prepare()
    from rich.console import Console

    from benchmarks.record import origin, write_section  # only now is JAX imported

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # a file has no width that a table must fit
    record = origin(command) | {"quick": flags.quick, "parts": {}}
    versions = " ".join(f"{name} {version}" for name, version in record["versions"].items())
    console.print(f"{record['device']}, {versions}\n", markup=False)
    failures = []
    for part in PARTS if flags.part is None else (flags.part,):
        start = time.perf_counter()
        result = run_part(part, flags)
        result.print(console)
        seconds = round(time.perf_counter() - start, 1)
        record["parts"][part] = result.as_json() | {"seconds": seconds}
        failures += result.failures
        if part == "temp" and flags.write_docs:
            write_section(result, record)
        record["failures"] = failures
        write(record, flags.output)  # after every part, so that a run cut short leaves something
    verdict = f"{len(failures)} bounds failed" if failures else "every bound holds"
    console.print("\n".join([verdict, *failures]), markup=False)
    if failures:
        raise SystemExit(1)


def run_part(part: str, flags: Flags):
    """Returns one part's `Result`."""
    from benchmarks.executor_parts import compile_time, copies, equality, evaluations, nested, temp

    if part == "nested":
        names = [field.name for field in dataclasses.fields(nested.Shape)]
        shape = nested.Shape(**{name: getattr(flags, name) for name in names})
        return nested.run(flags.quick, shape)
    modules = {
        "equality": equality,
        "evaluations": evaluations,
        "temp": temp,
        "compile": compile_time,
        "copies": copies,
    }
    return modules[part].run(flags.quick)


def main(tokens: Sequence[str] | None = None):
    """Runs the command; a refused command line is one line on stderr and exit code 2."""
    tokens = list(sys.argv[1:] if tokens is None else tokens)
    app = App(name="python -m benchmarks.executor", help_format="plaintext", version_flags=())

    def run(flags: Annotated[Flags, Parameter(name="*")] = Flags()):
        executor(flags, command=" ".join(["python -m benchmarks.executor", *tokens]))

    run.__doc__ = executor.__doc__
    app.default(run)
    try:
        function, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        flags = bound.arguments.get("flags", Flags())
        if isinstance(flags, Flags):
            check(flags)
    except (CycloptsError, ConfigError) as error:
        fail(error)
    function(*bound.args, **bound.kwargs)


def check(flags: Flags):
    """Raises `ConfigError` for flags that do not fit one another."""
    if flags.write_docs and (flags.part not in (None, "temp") or flags.quick):
        raise ConfigError(
            "--write-docs writes the whole table of temp; valid: --part temp, no --quick"
        )
    if flags.width % 128 or flags.width < 128:
        raise ConfigError(
            f"--width is {flags.width}; heads are of 128, so it is a multiple of that"
        )
    if flags.tokens % min(flags.tokens, flags.sequence):
        raise ConfigError(f"--tokens is {flags.tokens}, not a multiple of --sequence")
    if flags.blocks < 2 or flags.pairs < 1 or flags.tokens < 1 or flags.sequence < 1:
        raise ConfigError("--blocks is at least 2; --pairs, --tokens and --sequence at least 1")


if __name__ == "__main__":
    main()
