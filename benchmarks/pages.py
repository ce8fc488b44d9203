"""`python -m benchmarks.pages`: writes the tables of the documentation's pages anew.

A page marks the place of a table, and the table is made from data:

    <!-- table: targets -->
    ...
    <!-- end table -->

`--check` writes nothing, and ends with code 1 if a table on a page is out of date. The build of the
documentation calls `filled` too.
"""

import argparse
import re
from pathlib import Path

from benchmarks.tables import ROOT, TABLES
from jaxckpt.plans.errors import nearest

DOCS = ROOT / "docs"
_TABLE = re.compile(r"<!-- table: (?P<name>\S+) -->\n(?P<old>.*?)<!-- end table -->", re.DOTALL)


def filled(text: str) -> str:
    """Returns a page with its tables made anew.

    Raises:
      ValueError: A table has an unknown name, or has no end.
    """

    def made(match: re.Match) -> str:
        name = match["name"]
        if name not in TABLES:
            valid = ", ".join(TABLES)
            raise ValueError(f"no table {name!r}{nearest(name, TABLES)}; valid: {valid}")
        return f"<!-- table: {name} -->\n\n{TABLES[name]()}\n\n<!-- end table -->"

    if text.count("<!-- table: ") != text.count("<!-- end table -->"):
        raise ValueError(
            "a table is begun and not ended: <!-- table: NAME --> ... <!-- end table -->"
        )
    return _TABLE.sub(made, text)


def stale(docs: Path = DOCS) -> list[Path]:
    """Returns the pages with a table that differs from its data."""
    pages = [*sorted(docs.glob("*.md")), *docs.parent.glob("README.md")]
    return [path for path in pages if filled(path.read_text()) != path.read_text()]


def main(argv: list[str] | None = None) -> int:
    """Writes the pages, or with `--check` only names the pages that are out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    found = stale()
    for path in found:
        if not check:
            path.write_text(filled(path.read_text()))
        print(f"{'out of date' if check else 'written'}: {path.relative_to(ROOT)}")
    return int(check and bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
