"""The page: the claims, and a table of every plan on each model and chip."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.claiming.cases import EXAMPLE, LARGE_CHIP, PLANS, QWEN, SMALL_CHIP, plan_case
from experiments.claiming.claims import Claim
from experiments.claiming.evidence import Evidence, config_of, gib, percent, recomputed

# In the page's head: what this command may write over.
MARK = "This page is written by a command; no number in it was typed"
_HEAD = """# Claims, checked

What an often-copied explanation of gradient checkpointing says, restated, beside what XLA compiled
and what was measured. {mark}:

```bash
pip install -e '.[experiments,tpu,cuda13]'
python -m experiments.claims
```

Compiled rows are kept in `measured/claims.json`; a row that is there is not compiled again until it
is removed. Times on an H100 are those of `measured/peaks_h100.json`, growth with depth that of
`measured/executor_cpu.json`; both name their commands. The example is 32 layers of width 4,096,
batch 8 x 1,024 tokens; all chips are absent: they were compiled for, not run on. On {large} the
example's attention alone learns (`configs/note_32x4096_80gb.toml`), on {small} its heads and MLP
are narrow enough for AdamW on everything (`configs/note_32x4096_16gb.toml`). Every plan runs in the
same loop (`--unroll=1`).
"""


def page(claims: Sequence[Claim], evidence: Evidence) -> str:
    """Returns the page's text."""
    parts = [_HEAD.format(mark=MARK, large=LARGE_CHIP, small=SMALL_CHIP)]
    for number, claim in enumerate(claims, start=1):
        found = claim.held_against(evidence)
        parts.append(f"## {number}. {claim.says}\n\n{found.found}\n\n**{found.verdict}.**\n")
    parts.append(
        f"## {len(claims) + 1}. Methods, what they keep and cost, and when to use them\n\n"
        "Step times are the roofline's of the chip. Peaks include parameters, gradients and "
        "optimizer state.\n"
    )
    for model in (EXAMPLE, QWEN):
        for chip in (SMALL_CHIP, LARGE_CHIP):
            parts.append("\n".join(_table(model, chip, evidence)) + "\n")
    parts.append(
        "**true: printed for a model of your own by `python -m experiments.fit`.**\n\n"
        f"{_origins(evidence.rows)}\n"
    )
    return "\n".join(parts)


def _table(model: str, chip: str, evidence: Evidence) -> Iterator[str]:
    config = config_of(model, chip)
    names = {plan: plan_case(model, chip, plan).name for plan in PLANS}
    reports = {plan: evidence.report(names[plan]) for plan in PLANS if names[plan] in evidence.rows}
    usable = next((report["usable_bytes"] for report in reports.values()), 0)
    yield (
        f"### {model[0].upper()}{model[1:]}, {config.model.num_blocks} blocks, on {chip} "
        f"({gib(usable)} usable)\n"
    )
    yield "| plan | peak GiB | fits | run again | step, ms | largest buffer at the peak |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for plan in PLANS:
        if plan not in reports:
            yield f"| `{plan}` | not compiled yet | | | | |"
            continue
        report = reports[plan]
        fits = "yes" if report["peak_bytes"] <= usable else "no"
        again, seconds = percent(recomputed(report)), report["estimated_seconds"]
        cells = (f"`{plan}`", f"{report['peak_bytes'] / 2**30:.2f}", fits, again)
        yield f"| {' | '.join(cells)} | {1e3 * seconds:.0f} | {_largest(report)} |"


def _largest(report: Mapping[str, Any]) -> str:
    if not report["buffers"]:
        return "not said"
    buffer = report["buffers"][0]
    return f"`{buffer['shape']}`, {gib(buffer['size_bytes'])}"


def _origins(rows: Mapping[str, Any]) -> str:
    """Returns which compilers and commits made the rows, each said once."""
    found = {}
    for row in rows.values():
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        found.setdefault(versions, set()).add(row["commit"][:10])
    return "\n".join(
        f"Compiled with {versions}, at {', '.join(sorted(commits))}."
        for versions, commits in found.items()
    )
