"""Checks the promises about plans for any function on rows of `process`, and makes their table."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

Row = dict[str, Any]
EXACT = 1e-6  # the allowed error, as a share of a leaf's largest value, in float32
SLOWER = 1.02  # timings of one program differ by this factor
_MIB = 2**20


def check(rows: Sequence[Row]) -> list[str]:
    """Returns one line for each bound that does not hold."""
    return [f"{name}: {text}" for name, mine in _models(rows) for text in _failures(mine)]


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yields one line for each budget: the peak, the time, and the fastest fitting plan by hand."""
    unit = lambda size: f"{size / _MIB:8.0f}"
    yield "model     budget     peak  time ms | best by hand that fits | compiles  plan"
    for name, mine in _models(rows):
        hand = mine[0]["hand"]
        shown = ", ".join(
            f"{word} {one['bytes'] / _MIB:.0f} MiB {_time(one) * 1e3:.2f} ms"
            for word, one in hand.items()
        )
        yield f"{name}: {shown}; planned in {mine[0]['planned']:.1f} s beside compilations"
        for row in mine[1:]:
            best = _best(hand, row["budget_bytes"])
            text = f"{best} {_time(hand[best]) * 1e3:.2f}" if best else "nothing"
            plan = row["plan"] if len(row["plan"]) < 48 else row["plan"][:45] + "..."
            yield (
                f"{name:14} {unit(row['budget_bytes'])} {unit(row['peak_bytes'])} "
                f"{_time(row) * 1e3:8.2f} | {text:22} | {row['compiles']} {plan}"
            )


def _models(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for name in dict.fromkeys(row["name"] for row in rows):
        yield name, sorted((r for r in rows if r["name"] == name), key=lambda row: row["place"])


def _time(row: Row) -> float:
    return row.get("seconds", row["roofline"])


def _best(hand: dict[str, Row], budget: int) -> str | None:
    fitting = [word for word, one in hand.items() if one["bytes"] <= budget]
    return min(fitting, key=lambda word: _time(hand[word]), default=None)


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    hand, rows = rows[0]["hand"], rows[1:]
    for row in rows:
        at = f"{row['budget_bytes'] / _MIB:.0f} MiB, {row['plan'][:60]}"
        if row["peak_bytes"] > row["budget_bytes"]:
            yield f"{at}: the compiled peak is above the budget"
        best = _best(hand, row["budget_bytes"])
        if best and _time(row) > SLOWER * _time(hand[best]):
            yield f"{at}: {_time(row) / _time(hand[best]):.2f} of the time of {best}, which fits"
        if row["tiny"] and (row["gradient_error"] or 0) > EXACT:
            yield f"{at}: gradients differ by {row['gradient_error']:.1e}"
    for more, less in itertools.pairwise(rows):
        if less["peak_bytes"] > more["peak_bytes"]:
            yield f"the peak grows as the budget shrinks to {less['budget_bytes'] / _MIB:.0f} MiB"
