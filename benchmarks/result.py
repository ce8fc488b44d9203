"""The result of a part of a benchmark: its data, a printed table, and failed bounds."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One part's results.

    Attributes:
      title: What the table shows.
      rows: Every measurement; the JSON file has them all.
      table: The printed rows; every measurement is printed if this is empty.
      notes: Lines printed under the table: what was left out and why, known differences.
      failures: One line for each bound that does not hold.
    """

    title: str
    rows: Sequence[Row]
    table: Sequence[Row] = ()
    notes: Sequence[str] = ()
    failures: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """Returns the rows, notes and failures."""
        return {"rows": list(self.rows), "notes": list(self.notes), "failures": list(self.failures)}

    def print(self, console: Console):
        """Prints the table, the notes and the failures."""
        rows = list(self.table or self.rows)
        table = Table(title=self.title, title_justify="left", box=None)
        for name in columns(rows):
            table.add_column(name, no_wrap=True)
        for row in rows:
            table.add_row(*(text(row.get(name, "")) for name in columns(rows)))
        console.print(table, markup=False)
        for note in self.notes:
            console.print(f"note: {note}", markup=False)
        for failure in self.failures:
            console.print(f"FAILED: {failure}", markup=False)
        console.print()


def console(width: int) -> Console:
    """Returns the terminal; output that is not a terminal gets the given width."""
    found = Console(highlight=False, soft_wrap=True)
    if not found.is_terminal:
        found.width = width
    return found


def columns(rows: Iterable[Row]) -> list[str]:
    """Returns the names that any row has, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def text(value) -> str:
    """Returns a cell's text: few digits for floats, `-` for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.3f}"
    return str(value)


def markdown(rows: Sequence[Row]) -> str:
    """Returns the rows as a Markdown table."""
    names = columns(rows)
    return grid(names, [[text(row.get(name, "")) for name in names] for row in rows])


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns lines of cells as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
