"""Loops over time: `jaxckpt.scan` beside `lax.scan`, scans nested by hand, and Equinox's loop.

    python -m benchmarks.loops --output docs/measured/loops_cpu.json
    python -m benchmarks.loops --model rnn --command-buffers --output docs/measured/loops_h200.json

Each model and length has a fresh process. The loss reads every output of the loop. Temporaries are
the compiler's figure for its gradient. Exits with 1 if a bound fails, and prints a line for each
failed bound.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from benchmarks.record import Record, rows_of, with_flags
from benchmarks.result import Result, Row, console
from experiments.cli import main
from experiments.config import ConfigError
from experiments.loop import segments_of

MODELS = ("rnn", "reaction")
LENGTHS = (64, 256, 1000, 4096)
# Makes XLA compile a loop into a CUDA graph: the GPU then runs the loop without the host.
GRAPHS = "--xla_gpu_enable_command_buffer=WHILE,CONDITIONAL --xla_gpu_graph_min_graph_size=1"
METHODS = (
    *("plain", "checkpointed step", "nested by hand", "equinox, 16 states", "equinox"),
    *("sqrt", "uniform", "log", "binomial:16", "binomial:32"),
)


def loops(
    *,
    model: tuple[Literal["rnn", "reaction"], ...] = MODELS,
    length: tuple[int, ...] = LENGTHS,
    side: int = 96,
    method: tuple[str, ...] = METHODS,
    command_buffers: bool = False,
    output: Path | None = None,
):
    """Measure gradients of loops over time under every method; exit with 1 if a bound fails.

    Args:
      model: The loop's step; may be given several times.
      length: Steps; may be given several times.
      side: The side of the grid of `reaction`.
      method: A method to run beside `plain`; may be given several times.
      command_buffers: Run everything a second time with XLA's graphs for loops (on a GPU).
      output: JSON file to write.
    """
    if set(method) - set(METHODS) or min(length) < 1 or side < 1:
        raise ConfigError(f"methods are {', '.join(METHODS)}; lengths and the side at least 1")
    rows: list[Row] = []
    record = Record("loops", output, rows)
    for options in ("", GRAPHS)[: 1 + command_buffers]:
        for name, steps in [(name, steps) for name in model for steps in length]:
            about = {"side": side} if name == "reaction" else {}
            equal = f"uniform:{segments_of(steps)}"
            wanted = [equal if one == "uniform" else one for one in method]
            asked = ("loops_parts.process", name, steps, about, wanted)
            for row in rows_of(*asked, environment=with_flags(options)):
                rows.append({"model": name, "length": steps, **about, "options": options, **row})
                print(line(rows[-1]), flush=True)
                record.save(failures=[])
    failures = failed(rows)
    result = Result(title="gradients of loops", rows=rows, table=shown(rows), failures=failures)
    result.print(console(160))
    record.save(failures=failures)
    raise SystemExit(bool(failures))


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


if __name__ == "__main__":
    main(loops, package="benchmarks")
