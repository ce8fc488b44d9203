"""The page: `docs/claims.md.in` with its numbers filled in, and a table of every plan.

Braces in the template hold f-string expressions over `Evidence`'s methods. A verdict is a line
between `**`. A claim may have several verdicts; the first whose `if` holds is written.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.claiming.cases import (
    AUTO_BUDGET,
    EXAMPLE,
    LARGE_CHIP,
    PLANS,
    QWEN,
    ROOT,
    SMALL_CHIP,
    plan_case,
)
from experiments.claiming.evidence import FORMATS, Evidence, MissingRow, gib, percent
from jaxckpt.planner.budgets import given_bytes

# The text in the head of a page that this command may overwrite.
MARK = "This page is written by a command; no number in it was typed"
TEMPLATE = ROOT / "docs/claims.md.in"
_SECTION = "\n\n## "


def page(evidence: Evidence) -> str:
    """Returns the page's text."""
    names = names_of(evidence)
    sections = TEMPLATE.read_text(encoding="utf-8").split(_SECTION)
    return _SECTION.join(_filled(section, names) for section in sections)


def names_of(evidence: Evidence) -> dict[str, Any]:
    """Returns the names that the expressions of `docs/claims.md.in` may use."""
    methods = [name for name in dir(Evidence) if not name.startswith("_")]
    return {name: getattr(evidence, name) for name in methods} | {
        **FORMATS,
        "QWEN": QWEN,
        "qwen": evidence.config(QWEN).model,
        "blocks": evidence.config().model.num_blocks,
        "auto_budget": given_bytes(AUTO_BUDGET),
        "tables": "\n\n".join(
            "\n".join(_table(evidence, model, chip))
            for model in (EXAMPLE, QWEN)
            for chip in (SMALL_CHIP, LARGE_CHIP)
        ),
        "origins": _origins(evidence.rows),
    }


def _filled(section: str, names: dict[str, Any]) -> str:
    """Returns a section with its numbers and its verdict; a claim without its numbers is open."""
    try:
        return "\n\n".join(_paragraph(text, names) for text in section.split("\n\n"))
    except MissingRow as missing:
        says, _ = section.split("\n", 1)
        return f"{says}\n\n{missing} is not compiled yet.\n\n**open.**"


def _paragraph(text: str, names: dict[str, Any]) -> str:
    if not text.startswith("**"):
        return eval(f'f"""{text}"""', names)
    verdicts = (line.partition("** if ") for line in text.splitlines())
    holds = lambda test: not test or eval(test, names)
    return next(f"{says.removesuffix('**')}**" for says, _, test in verdicts if holds(test))


def _table(evidence: Evidence, model: str, chip: str) -> Iterator[str]:
    names = {plan: plan_case(model, chip, plan).name for plan in PLANS}
    found = {plan: evidence.case(name) for plan, name in names.items() if name in evidence.rows}
    usable = next((report.usable_bytes for report in found.values()), 0)
    blocks = evidence.config(model, chip).model.num_blocks
    yield f"### {model[0].upper()}{model[1:]}, {blocks} blocks, on {chip} ({gib(usable)} usable)\n"
    yield "| plan | peak GiB | fits | recomputed | step, ms | largest buffer at the peak |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for plan in PLANS:
        if plan not in found:
            yield f"| `{plan}` | not compiled yet | | | | |"
            continue
        report = found[plan]
        largest = [f"`{one['shape']}`, {gib(one['size_bytes'])}" for one in report.buffers[:1]]
        yield (
            f"| `{plan}` | {report.peak_bytes / 2**30:.2f} | {'yes' if report.fits else 'no'} | "
            f"{percent(report.again)} | {1e3 * report.estimated_seconds:.0f} | "
            f"{''.join(largest) or 'not said'} |"
        )


def _origins(rows: Mapping[str, Any]) -> str:
    """Returns the compilers and commits that made the rows, each once."""
    found = {}
    for row in rows.values():
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        found.setdefault(versions, set()).add(row["commit"][:10])
    return "\n".join(
        f"Compiled with {versions}, at {', '.join(sorted(commits))}."
        for versions, commits in found.items()
    )
