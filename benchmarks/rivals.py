"""The planner's answers beside fixed plans, MaxText's among them, timed in turns on one GPU.

    python -m benchmarks.rivals --output docs/measured/rivals_h200.json

The step is Qwen3-0.6B's whole train step, at several batch shapes. The budgets of a shape are
spread evenly from the least that works to what `none` needs. The planner answers each budget, and
times a block on the chip for it. At each budget its answer has to be as fast as the best fixed plan
that fits, and at some budget of each shape it has to be faster than the best of MaxText's plans.

A shape is one process, in which all programs take turns on one train state. Its row is written
before timing and after each round. A finished shape is not measured again on the same GPU. With
`JAX_COMPILATION_CACHE_DIR` set, no program is compiled twice.

Exits with 1 if a bound fails. Needs the `planner` extra.
"""

import time
from pathlib import Path

from benchmarks import cases
from benchmarks.record import Record, finish, kept, rows_of
from benchmarks.result import console
from benchmarks.rivals_parts.bounds import check, result
from benchmarks.step import gpu
from experiments.cli import main
from experiments.config import ConfigError, check_least
from jaxckpt.compiled import cache
from jaxckpt.plans.errors import check_word

_ABOUT = {"budgets": 5, "rounds": 7, "tiny": False}
SHAPES: dict[str, cases.Case] = {
    "8x1024": {**cases.SHORT, **_ABOUT, "steps": 5},
    "2x16384": {**cases.LONG, **_ABOUT, "steps": 1},
}


def rivals(
    *,
    output: Path | None = None,
    shape: tuple[str, ...] = (),
    budgets: int = 5,
    minutes: float | None = None,
    tiny: bool = False,
):
    """Time the planner's answers beside fixed plans; exit with 1 if a bound fails.

    Args:
      output: JSON file to write; an interrupted run continues from it.
      shape: `8x1024` or `2x16384`; may be given several times. All shapes by default.
      budgets: Number of budgets for each shape, at least 2.
      minutes: Limit for all shapes together; programs beyond it are left out, and named.
      tiny: A small model, on any device, to try the script.
    """
    for name in shape:
        check_word("shape", name, tuple(SHAPES), ConfigError)
    check_least(2, budgets=budgets)
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"--minutes is {minutes}; it is more than 0")
    started, names = time.monotonic(), shape or tuple(SHAPES)
    record = Record("rivals", output, kept(output) or {})
    for place, name in enumerate(names):
        case = SHAPES[name] | {"budgets": budgets}
        case = cases.tiny(case) | {"rounds": 3} if tiny else case
        left = None if minutes is None else 60 * minutes - (time.monotonic() - started)
        _measure(record, name, case, None if left is None else left / (len(names) - place))
    rows = {name: record.rows[name] for name in names}
    for name, row in rows.items():
        result(name, row).print(console(240))
    finish(check(rows))


def _measure(record: Record, name: str, case: cases.Case, seconds: float | None):
    """Measures a shape within some seconds, and saves each row of it as it comes."""
    # A row is valid for one GPU, one case and one version of the sources.
    sources = cache.digest_of_sources({"benchmarks"})[:16]
    made = {"case": case, "gpu": gpu(), "sources": sources}
    old = record.rows.get(name, {})
    is_same = made.items() <= old.items()
    if is_same and old.get("is_whole"):
        return
    least = old.get("rounds", 0) if is_same else 0
    for row in rows_of("rivals_parts.process", case, seconds):
        if "says" in row:
            print(f"{name}: {row['says']}", flush=True)
        elif "error" in row:
            record.rows[name] = record.rows.get(name, {}) | made | row
            record.save()
        elif row["rounds"] >= least:  # a kept row with more rounds is not replaced yet
            record.rows[name] = made | row
            record.save()


if __name__ == "__main__":
    main(rivals, package="benchmarks")
