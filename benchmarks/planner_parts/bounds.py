"""The bounds of the planner's answers for one step, checked on the rows of `process`."""

import itertools
import statistics
from collections.abc import Iterator, Sequence

from benchmarks.result import Row

MEDIAN, WORST, MOST_COMPILES = 0.01, 0.02, 6


def check(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each bound that does not hold."""
    return [f"{part}: {text}" for part, mine in _parts(rows) for text in _failures(mine)]


def summaries(rows: Sequence[Row]) -> Iterator[str]:
    """Yields a line for each part: how far off its predictions are, how much it compiled."""
    for one in figures(rows):
        yield (
            f"{one['part']}: {one['budgets']} budgets; predictions off by "
            f"{one['median']} in the median, {one['worst']} at worst; at most "
            f"{one['compiles']} compilations; planned in at most {one['planned']} beside them"
        )


def figures(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    """Yields the figures of each part as text, and the bounds that do not hold."""
    for part, mine in _parts(rows):
        off = [_off(row) for row in mine]
        yield {
            "part": part,
            "budgets": f"{len(mine)} of {mine[0]['budgets']}",
            "median": f"{statistics.median(off):.2%}",
            "worst": f"{max(off):.2%}",
            "compiles": str(max(row["compiles"] for row in mine)),
            "planned": f"{max(row['planning_seconds'] for row in mine):.1f} s",
            "failures": "; ".join(_failures(mine)),
        }


def line(row: Row) -> str:
    """Returns a row as a line."""
    return (
        f"{row['part']:14} {_gib(row['budget_bytes'])}: {_gib(row['compiled_bytes'])} compiled, "
        f"{_gib(row['predicted_bytes'])} predicted, {row['recomputed_flops']:.3e} FLOPs again "
        f"({row['fixed_plan']}: {row['fixed_recomputed_flops'] or 0:.3e}), "
        f"{row['compiles']} compiles, {row['plan']}"
    )


def _parts(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        yield part, sorted(mine, key=lambda row: -row["budget_bytes"])


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        at = f"{_gib(row['budget_bytes'])}, {row['plan']}"
        if row["compiled_bytes"] > row["budget_bytes"]:
            yield f"{at}: the compiled peak is above the budget"
        if _off(row) > WORST:
            yield f"{at}: predicted off by {_off(row):.2%}, bound {WORST:.0%}"
        if row["compiles"] > MOST_COMPILES:
            yield f"{at}: {row['compiles']} compilations, bound {MOST_COMPILES}"
        fixed = row["fixed_recomputed_flops"]
        if fixed is not None and row["recomputed_flops"] > fixed:
            yield f"{at}: recomputes more than {row['fixed_plan']}, which fits"
    for more, less in itertools.pairwise(rows):
        if less["compiled_bytes"] > more["compiled_bytes"]:
            yield f"the peak grows as the budget shrinks to {_gib(less['budget_bytes'])}"
    median = statistics.median(map(_off, rows))
    if median > MEDIAN:
        yield f"predicted off by {median:.2%} in the median, bound {MEDIAN:.0%}"
    top = rows[0]
    if top["place"] == 0 and top["recomputed_flops"] > 0:
        yield f"at the budget of none, {top['plan']} recomputes"


def _off(row: Row) -> float:
    return abs(row["predicted_bytes"] / row["compiled_bytes"] - 1)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f} GiB"
