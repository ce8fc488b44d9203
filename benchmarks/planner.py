"""The planner's promises, checked by compiling: many budgets of one step, for chips not present.

    python -m benchmarks.planner --output docs/measured/planner_absent.json

For each part (a chip, a batch, a sequence) of Qwen3-0.6B's whole train step: budgets spread evenly
from the least that works to what `none` needs, and for each what the planner answers. A part is one
process, in which its budgets share the traced step; each is planned as if it were alone, with its
own count of compilations. Rows are written as they finish, and a run cut short goes on by the same
command: rows made by another planner are made again, programs are not compiled again.

Exits with 1 if a bound fails. Needs the `tpu` and `cuda13` extras, no chip; about a minute of two
cores a compilation.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from benchmarks.planner_parts.bounds import check, line, summaries
from benchmarks.planner_parts.part import Case, run_part
from benchmarks.record import write
from jaxckpt.absent import launch
from jaxckpt.compiled import cache
from jaxckpt.targets.target import parse_target

_SHORT: dict[str, Any] = {"batch_size": 8, "seq_len": 1024}
_LONG: dict[str, Any] = {"batch_size": 2, "seq_len": 16384}
PARTS = {
    "v5e-1-8x1024": Case(target="v5e-1", budgets=20, **_SHORT),
    "v5e-1-2x16384": Case(target="v5e-1", budgets=5, **_LONG),
    "v6e-1-8x1024": Case(target="v6e-1", budgets=5, **_SHORT),
    "v6e-1-2x16384": Case(target="v6e-1", budgets=5, **_LONG),
    "h100-8x1024": Case(target="h100", budgets=5, **_SHORT),
    "h100-2x16384": Case(target="h100", budgets=5, **_LONG),
}


def planner(
    *,
    output: Path | None = None,
    part: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    budgets: int | None = None,
    tiny: Annotated[bool, Parameter(negative=())] = False,
):
    """Plan for many budgets and check what is promised; exit with 1 if a bound fails.

    Args:
      output: JSON file to write, and to go on with.
      part: A part by its name; may be given several times. All by default.
      budgets: Budgets of each part, at least 2.
      tiny: A small model, to try the script.
    """
    cases = _cases(part, budgets, tiny)
    command = _command(output, part, budgets, tiny)
    # What decides an answer beside the compiled peaks, which are kept by program.
    sources = cache.digest_of_sources({"benchmarks"})[:16]
    rows = _resume(output, sources)
    for name, case in cases.items():
        made = {"part": name, "sources": sources, "case": case.as_json()}
        done = [row["place"] for row in rows if made.items() <= row.items()]
        rows = [row for row in rows if row["part"] != name or made.items() <= row.items()]
        for row in run_part(case, done):
            rows.append(made | row)
            print(line(rows[-1]), flush=True)
            _write(output, command, rows)
    failures = check(rows)
    print("\n".join((*summaries(rows), *(failures or ["every bound holds"]))))
    sys.exit(bool(failures))


def _cases(names: Sequence[str], budgets: int | None, tiny: bool) -> dict[str, Case]:
    """Returns the parts that are asked for; whatever is wrong with them ends the command."""
    for name in names:
        if name not in PARTS:
            sys.exit(_refused(f"part {name!r} is not known; valid: {', '.join(PARTS)}"))
    if budgets is not None and budgets < 2:
        sys.exit(_refused(f"--budgets is {budgets}; the least is 2"))
    asked = {name: PARTS[name].changed(budgets, tiny) for name in names or PARTS}
    for case in asked.values():
        try:
            launch.check_available(parse_target(case.target))
        except launch.Unavailable as error:
            sys.exit(_refused(str(error)))
    return asked


def _refused(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def _resume(output: Path | None, sources: str) -> list[dict[str, Any]]:
    """Returns the rows of a file that this planner made."""
    if output is None or not output.exists():
        return []
    rows = json.loads(output.read_text())["rows"]
    return [row for row in rows if row["sources"] == sources]


def _command(output: Path | None, parts: Sequence[str], budgets: int | None, tiny: bool) -> str:
    """Returns the command line that asks for the same."""
    flags = [f"--part {part}" for part in parts]
    flags += [] if budgets is None else [f"--budgets {budgets}"]
    flags += ["--tiny"] * tiny + ([] if output is None else [f"--output {output}"])
    return " ".join(["python -m benchmarks.planner", *flags])


def _write(output: Path | None, command: str, rows: Sequence[dict[str, Any]]):
    if output is None:
        return
    from benchmarks.record import origin

    record = origin(command) | {"rows": list(rows)}
    write(record, output)


if __name__ == "__main__":
    app = App(name="python -m benchmarks.planner", help_format="plaintext")
    app.default(planner)
    app()
