"""The planner's promises, checked by compiling: many budgets of one step, for chips not present.

    python -m benchmarks.planner --output docs/measured/planner_absent.json

A part is a chip, a batch size and a sequence length of Qwen3-0.6B's whole train step. Its budgets
are spread evenly from the least that works to what `none` needs, and the planner answers each. A
part is one process: its budgets share the traced step, but each is planned as if it were alone,
with its own count of compilations. Rows are written as they finish, and the same command continues
an interrupted run. Rows of another version of the planner are made again; compiled programs are
kept.

Exits with 1 if a bound fails. Needs the `tpu` and `cuda13` extras, no chip; about a minute of two
cores a compilation.
"""

from pathlib import Path

from benchmarks import cases
from benchmarks.planner_parts.bounds import check, line, summaries
from benchmarks.record import HOST, Record, finish, kept, rows_of
from experiments.cli import main
from experiments.config import ConfigError, check_least
from jaxckpt.absent import launch
from jaxckpt.compiled import cache
from jaxckpt.plans.errors import check_word
from jaxckpt.targets.target import parse_target

_BATCHES = {"8x1024": cases.SHORT, "2x16384": cases.LONG}
PARTS: dict[str, cases.Case] = {
    f"{target}-{name}": {"target": target, **batch, "budgets": 5, "tiny": False}
    for target in ("v5e-1", "v6e-1", "h100")
    for name, batch in _BATCHES.items()
}
PARTS["v5e-1-8x1024"]["budgets"] = 20


def planner(
    *,
    output: Path | None = None,
    part: tuple[str, ...] = (),
    budgets: int | None = None,
    tiny: bool = False,
):
    """Plan for many budgets and check what is promised; exit with 1 if a bound fails.

    Args:
      output: JSON file to write; an interrupted run continues from it.
      part: A part's name; may be given several times. All parts by default.
      budgets: Number of budgets for each part, at least 2.
      tiny: A small model, to try the script.
    """
    for name in part:
        check_word("part", name, tuple(PARTS), ConfigError)
    if budgets is not None:
        check_least(2, budgets=budgets)
    for name in part or PARTS:
        launch.check_available(parse_target(PARTS[name]["target"]))
    # A row is valid for one version of the planner's sources; compiled peaks are kept by program.
    sources = cache.digest_of_sources({"benchmarks"})[:16]
    rows = [row for row in kept(output) or [] if row["sources"] == sources]
    record, failures = Record("planner", output, rows), []
    for name in part or PARTS:
        case = PARTS[name] | {"budgets": budgets or PARTS[name]["budgets"]}
        case = cases.tiny(case) if tiny else case
        made = {"part": name, "sources": sources, "case": case}
        rows = [row for row in record.rows if row["part"] != name or made.items() <= row.items()]
        record.rows, done = rows, [row["place"] for row in rows if row["part"] == name]
        if len(done) >= case["budgets"]:
            continue
        environment = launch.environment(parse_target(PARTS[name]["target"]))
        asked = ("planner_parts.process", case, done)
        for row in rows_of(*asked, environment=environment):
            if "error" in row:
                failures.append(f"{name}: {row['error']}")
                continue
            record.rows.append(made | row)
            print(line(record.rows[-1]), flush=True)
            record.save(HOST)
    print("\n".join(summaries(record.rows)))
    finish(failures + check(record.rows))


if __name__ == "__main__":
    main(planner, package="benchmarks")
