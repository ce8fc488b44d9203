"""Loops over time: `jaxckpt.scan` beside `lax.scan`, scans nested by hand, and Equinox's loop.

    python -m benchmarks.loops --output docs/measured/loops_cpu.json
    python -m benchmarks.loops --model rnn --command-buffers --output docs/measured/loops_h200.json

Each model and length has a fresh process. Temporaries are the compiler's, of the gradient of a loss
that reads every output. Exits with 1 if a bound fails, and prints each that does in one line.
"""

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from benchmarks.record import ChildError, values_of, write
from benchmarks.result import Result
from experiments.cli import fail
from experiments.loop import segments_of

MODELS = ("rnn", "reaction")
LENGTHS = (64, 256, 1000, 4096)
# On a GPU a loop whose bounds are data becomes a graph that the GPU runs by itself.
GRAPHS = "--xla_gpu_enable_command_buffer=WHILE,CONDITIONAL --xla_gpu_graph_min_graph_size=1"
METHODS = (
    *("plain", "checkpointed step", "nested by hand", "equinox, 16 states", "equinox"),
    *("sqrt", "uniform", "log", "binomial:16", "binomial:32"),
)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line.

    Attributes:
      model: What is run; may be given several times.
      length: Steps; may be given several times.
      side: Of the grid of reaction and diffusion.
      method: What is run beside `plain`; may be given several times.
      command_buffers: Run everything a second time with XLA's graphs for loops (on a GPU).
      output: JSON file to write.
    """

    model: Annotated[tuple[Literal["rnn", "reaction"], ...], Parameter(negative=())] = MODELS
    length: Annotated[tuple[int, ...], Parameter(negative=())] = LENGTHS
    side: int = 96
    method: Annotated[tuple[str, ...], Parameter(negative=())] = METHODS
    command_buffers: Annotated[bool, Parameter(negative=())] = False
    output: Path | None = None


def loops(flags: Annotated[Flags, Parameter(name="*")] = Flags(), *, command: str = ""):
    """Measure gradients of loops over time under every method; exit with 1 if a bound fails."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, width=160)
    rows: list[Row] = []
    for options in ("", GRAPHS)[: 1 + flags.command_buffers]:
        environment = dict(os.environ)
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {options}".strip()
        for model in flags.model:
            about = {"side": flags.side} if model == "reaction" else {}
            for length in flags.length:
                rows += measured(model, length, about, flags.method, environment, options)
                _write(flags.output, command, rows, [])
    failures = failed(rows)
    result = Result(title="gradients of loops", rows=rows, table=shown(rows), failures=failures)
    result.print(console)
    _write(flags.output, command, rows, failures)
    sys.exit(bool(failures))


def measured(model: str, length: int, about: dict, names, environment, options: str) -> list[Row]:
    """Returns the rows of one process; what it got to before it failed, and then why it did."""
    found: list[Row] = []
    wanted = [name if name != "uniform" else f"uniform:{segments_of(length)}" for name in names]
    try:
        asked = (model, length, about, wanted)
        for row in values_of("loops_parts.process", *asked, environment=environment, name=model):
            found.append({**about, "options": options, **row})
            print(line(found[-1]), flush=True)
    except ChildError as error:
        found.append({"model": model, "length": length, "options": options, "error": str(error)})
        print(line(found[-1]), flush=True)
    return found


def line(row: Row) -> str:
    """Returns a row as a line of the terminal."""
    name = f"{row['model']:9}{row['length']:6} {row.get('method', ''):20}"
    graphs = " graphs" if row["options"] else ""
    if "error" in row:
        return f"{name} {row['error']}"
    return (
        f"{name} {row['temp_bytes'] / 2**20:10.2f} MiB {1e3 * row['seconds']:10.1f} ms "
        f"{1e3 * row['cpu_seconds']:10.1f} ms of the processor, compiled in "
        f"{row['compile_seconds']:.1f} s, gradients off by {row['error_of_gradients']:.0e}{graphs}"
    )


def shown(rows: Sequence[Row]) -> list[Row]:
    """Returns the table: a row for each method and length, in MiB and ms."""
    return [
        {
            "model": row["model"],
            "T": row["length"],
            "method": row["method"] + ("*" if row["options"] else ""),
            "temp MiB": row["temp_bytes"] / 2**20,
            "ms": 1e3 * row["seconds"],
            "cpu ms": 1e3 * row["cpu_seconds"],
            "steps run": row["evaluations"],
            "compile s": row["compile_seconds"],
        }
        for row in rows
        if "error" not in row
    ]


def failed(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each bound that does not hold."""
    found = []
    of = {(r["model"], r["length"], r["options"], r["method"]): r for r in rows if "error" not in r}
    for (model, length, options, method), row in of.items():
        name = f"{model} {length} {method}{' graphs' if options else ''}"
        if not row["error_of_gradients"] <= 1e-6:
            found.append(f"{name}: gradients off by {row['error_of_gradients']:.1e}, at most 1e-6")
        on_gpu = row["device"].startswith("gpu")
        clock = "seconds" if on_gpu else "cpu_seconds"
        rival = of.get((model, length, options, "equinox, 16 states"))
        if method == "binomial:16" and rival:
            most = 0.4 if on_gpu else 0.6
            found += _above(name, "temporaries", row, rival, "temp_bytes", 1.0)
            found += _above(name, "time", row, rival, clock, most)
            found += _above(name, "compile time", row, rival, "compile_cpu_seconds", 0.6)
        hand = of.get((model, length, options, "nested by hand"))
        if method == "sqrt" and hand and on_gpu:
            pair = [row, of.get((model, length, options, f"uniform:{segments_of(length)}"), row)]
            lean = [one for one in pair if one["temp_bytes"] <= hand["temp_bytes"]]
            best = min(lean or pair, key=lambda one: one["seconds"])
            found += _above(name, "temporaries", best, hand, "temp_bytes", 1.0)
            found += _above(name, "time", best, hand, "seconds", 1.05)
    return found


def _above(name: str, what: str, row: Row, rival: Row, key: str, most: float) -> list[str]:
    ratio = row[key] / max(rival[key], 1e-9)
    if ratio <= most:
        return []
    return [f"{name}: {ratio:.2f} of the {what} of {rival['method']}, at most {most}"]


def _write(output: Path | None, command: str, rows: list[Row], failures: list[str]):
    if output is None:
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process must hold nothing of a GPU
    from benchmarks.record import origin

    device = next((row["device"] for row in rows if "device" in row), "none")
    about = {"device": device, "backend": device.split()[0], "rows": rows, "failures": failures}
    write(origin(command) | about, output)


def main(tokens: Sequence[str] | None = None):
    """Runs the command; a refused command line is one line on stderr and exit code 2."""
    tokens = list(sys.argv[1:] if tokens is None else tokens)
    app = App(name="python -m benchmarks.loops", help_format="plaintext", version_flags=())

    def run(flags: Annotated[Flags, Parameter(name="*")] = Flags()):
        loops(flags, command=shlex.join(["python", "-m", "benchmarks.loops", *tokens]))

    run.__doc__ = loops.__doc__
    app.default(run)
    try:
        function, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        flags = bound.arguments.get("flags", Flags())
        unknown = [name for name in flags.method if name not in METHODS]
        if unknown or min(flags.length) < 1 or flags.side < 1:
            fail(f"methods are {', '.join(METHODS)}; lengths and the side at least 1")
    except CycloptsError as error:
        fail(error)
    function(*bound.args, **bound.kwargs)


if __name__ == "__main__":
    main()
