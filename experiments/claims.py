"""Hold the claims of an often-copied explanation of checkpointing against the compiler.

python -m experiments.claims        # writes docs/claims.md from docs/claims.md.in

Rows that `docs/measured/claims.json` does not hold yet need the compilers of the absent chips. The
same command goes on with a run that was cut short.
"""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from experiments import files
from experiments.claiming.cases import ROOT, all_cases
from experiments.cli import main

_PAGE, _NUMBERS = ROOT / "docs/claims.md", ROOT / "docs/measured/claims.json"


def claims(
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"), help="Page to write.")] = _PAGE,
    numbers: Annotated[Path, Parameter(help="JSON file of compiled rows.")] = _NUMBERS,
    compile: Annotated[
        bool, Parameter(help="Compile missing rows. Otherwise claims that need them stay open.")
    ] = True,
):
    """Compile missing rows, and write the page of claims."""
    from experiments.claiming import page

    files.check_output(out, (".md",), page.MARK)
    files.check_output(numbers, (".json",), mark="")  # its content is checked when it is read

    from experiments.claiming.evidence import gather
    from experiments.claiming.numbers import checked, compiled, kept

    say = lambda text: print(text, flush=True)
    cases = all_cases()
    if compile:
        rows, checks = compiled(cases, numbers, say), checked(numbers, say)
    else:
        rows, checks = kept(numbers)
    text = page.page(gather(rows, checks))
    files.write_text(out, text)
    count = text.count("\n## ") - 1
    missing = f"; {len(cases) - len(rows)} are missing" if len(rows) < len(cases) else ""
    say(f"{out}: {count} claims and the table of methods, from {len(rows)} compilations{missing}")


if __name__ == "__main__":
    main(claims)
