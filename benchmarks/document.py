"""Writes a table into docs/theory.md between two markers, with the command that made it."""

from pathlib import Path
from typing import Any

from benchmarks.result import Result, markdown
from experiments.provenance import ROOT

PATH = ROOT / "docs" / "theory.md"
BEGIN, END = "<!-- begin: made by a command -->", "<!-- end: made by a command -->"


def write_section(result: Result, record: dict[str, Any], path: Path = PATH):
    """Replaces what stands between the markers by the result's table and where it comes from."""
    before, rest = path.read_text().split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n{section(result, record)}\n{END}{after}")


def section(result: Result, record: dict[str, Any]) -> str:
    """Returns the table as Markdown under its command, commit, versions and device."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"Made by `{record['command']}` on {record['device']}, {versions}.", ""]
    lines += [markdown(result.table or result.rows)]
    lines += [f"\nNot compiled here: {note}." for note in result.notes]
    return "\n".join(lines)
