"""Draw what a plan does: time across, blocks up, what is held shaded, counts below.

python -m experiments.draw binomial:4 --blocks 32
python -m experiments.draw 8xsqrt/full+attention --blocks 28 -o plan.svg
"""

import shutil
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from experiments import files, plotting
from experiments.cli import main
from experiments.config import check_least
from experiments.drawing.timeline import as_text, timeline
from jaxckpt.plans import Plan

_BLOCKS = 32


def draw(
    plan: Annotated[str, Parameter(help="A checkpointing plan, such as binomial:4.")],
    *,
    blocks: Annotated[
        int | None, Parameter(help="Blocks of the stack; by default the plan's own number, or 32.")
    ] = None,
    out: Annotated[
        Path | None,
        Parameter(name=("--out", "-o"), help="File: .txt, .svg or .png. By default, print text."),
    ] = None,
):
    """Draw a plan's schedule: which block runs when, and what is held meanwhile."""
    parsed = Plan.parse(plan)
    if blocks is not None:
        check_least(1, blocks=blocks)
    if out is not None:
        files.check_output(out, (".txt", *plotting.FIGURES))
    line = timeline(parsed.bind(blocks or parsed.num_blocks or _BLOCKS))
    if out is None:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(as_text(line, columns))
    elif out.suffix.lower() == ".txt":
        files.write_text(out, f"{as_text(line)}\n\n{files.MARK}\n")
    else:
        from experiments.drawing import figure

        plotting.save(figure.draw(line), out)


if __name__ == "__main__":
    main(draw)
