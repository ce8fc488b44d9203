"""The planner's answers beside fixed plans, MaxText's among them, timed in turns on one GPU.

    python -m benchmarks.rivals --output docs/measured/rivals_h200.json

For each shape of Qwen3-0.6B's whole train step: budgets spread evenly from the least that works to
what `none` needs, and for each what the planner answers within it, with a block timed on the chip.
At each budget it has to be as fast as the best fixed plan that fits, and at some budget of each
shape faster than the best of MaxText's.

A shape is one process, in which all programs take turns on one state. What is known is written
before timing and after each round; a shape that is whole is not measured again on the same GPU.
With `JAX_COMPILATION_CACHE_DIR` set, what was compiled before is not compiled again either.

Exits with 1 if a bound fails. Needs the `planner` extra.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from benchmarks.record import ChildError, write
from benchmarks.rivals_parts.bounds import check, result
from benchmarks.rivals_parts.part import SHAPES, Case, run_part
from benchmarks.step import gpu
from experiments.cli import fail
from experiments.config import ConfigError
from jaxckpt.compiled import cache
from jaxckpt.plans.errors import nearest

Rows = dict[str, dict[str, Any]]


def rivals(
    *,
    output: Path | None = None,
    shape: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    budgets: int = 5,
    minutes: float | None = None,
    tiny: Annotated[bool, Parameter(negative=())] = False,
):
    """Time the planner's answers beside fixed plans; exit with 1 if a bound fails.

    Args:
      output: JSON file to write, and to go on with.
      shape: `8x1024` or `2x16384`; may be given several times. All by default.
      budgets: Budgets of each shape, at least 2.
      minutes: What all may take: programs for which there is no time are left out, and named.
      tiny: A small model, on any device, to try the script.
    """
    environment = dict(os.environ)
    started, rows = time.monotonic(), _read(output)
    names = shape or tuple(SHAPES)
    command = _command(output, shape, budgets, minutes, tiny)
    save = lambda: _write(output, command, rows)
    for place, name in enumerate(names):
        case = SHAPES[name].changed(budgets, tiny)
        left = None if minutes is None else 60 * minutes - (time.monotonic() - started)
        share = None if left is None else left / (len(names) - place)
        _measure(name, case, share, environment, rows, save)
    _print({name: rows[name] for name in names})
    sys.exit(bool(check({name: rows[name] for name in names})))


def _measure(
    name: str,
    case: Case,
    seconds: float | None,
    environment: Mapping[str, str],
    rows: Rows,
    save: Callable[[], None],
):
    """Measures a shape, and saves what is known of it as it comes."""
    made = {"case": case.as_json(), "gpu": gpu()}
    # What decides a row beside the GPU.
    made |= {"sources": cache.digest_of_sources({"benchmarks"})[:16]}
    old = rows.get(name, {})
    is_same = made.items() <= old.items()
    if is_same and old.get("is_whole"):
        return
    least = old.get("rounds", 0) if is_same else 0
    try:
        for row in run_part(name, case, seconds, environment):
            if "says" in row:
                print(f"{name}: {row['says']}", flush=True)
            elif row["rounds"] >= least:  # what was timed before stays until there is as much
                rows[name] = made | row
                save()
    except ChildError as error:
        failed = {"error": str(error), "traceback": error.text}
        rows[name] = rows.get(name, {}) | made | failed
        save()


def _read(output: Path | None) -> Rows:
    return {} if output is None or not output.exists() else json.loads(output.read_text())["rows"]


def _command(
    output: Path | None, shape: Sequence[str], budgets: int, minutes: float | None, tiny: bool
) -> str:
    """Returns the command line that asks for the same."""
    flags = [f"--shape {name}" for name in shape]
    flags += [] if budgets == 5 else [f"--budgets {budgets}"]
    flags += [] if minutes is None else [f"--minutes {minutes:g}"]
    flags += ["--tiny"] * tiny + ([] if output is None else [f"--output {output}"])
    return " ".join(["python -m benchmarks.rivals", *flags])


def _write(output: Path | None, command: str, rows: Rows):
    if output is None:
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process must hold nothing of the GPU
    from benchmarks.record import origin

    found = next((row["device"] for row in rows.values() if "device" in row), None)
    record = origin(command)
    record |= {"backend": str(found).partition(" ")[0], "device": found, "rows": rows}
    write(record, output)


def _print(rows: Rows):
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 240  # a file has no width that a table must fit
    for name, row in rows.items():
        result(name, row).print(console)
    count = len(check(rows))
    print(f"{count} bounds failed" if count else "every bound holds")


def _refuse(shape: Sequence[str], budgets: int, minutes: float | None):
    """Raises `ConfigError` for flags that ask for nothing that can be measured."""
    for name in shape:
        if name not in SHAPES:
            valid = ", ".join(SHAPES)
            raise ConfigError(f"shape {name!r} is not known; valid: {valid}{nearest(name, SHAPES)}")
    if budgets < 2:
        raise ConfigError(f"--budgets is {budgets}; the least is 2")
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"--minutes is {minutes}; it is more than 0")


def main(tokens: Sequence[str] | None = None):
    """Runs the command; a refused command line is one line on stderr and exit code 2."""
    app = App(name="python -m benchmarks.rivals", help_format="plaintext", version_flags=())
    app.default(rivals)
    try:
        tokens = sys.argv[1:] if tokens is None else tokens
        function, bound, _ = app.parse_args(list(tokens), exit_on_error=False, print_error=False)
        if function is rivals:
            asked = bound.arguments
            given = (asked.get("shape", ()), asked.get("budgets", 5), asked.get("minutes"))
            _refuse(*given)
    except (CycloptsError, ConfigError) as error:
        fail(error)
    function(*bound.args, **bound.kwargs)


if __name__ == "__main__":
    main()
