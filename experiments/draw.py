"""Draw what a plan does: time across, blocks up, what is held shaded, counts below.

python -m experiments.draw binomial:4 --blocks 32
python -m experiments.draw 8xsqrt/full+attention --blocks 28 -o plan.svg
python -m experiments.draw result.json -o memory.svg

A file of a planner's answer (`json.dump(result.as_json(), file)` of a `jaxckpt.fit` result) is
drawn as the bytes that its stages hold over a step, beside those of `none`.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from experiments import files, plotting
from experiments.cli import main
from experiments.config import ConfigError, check_least
from experiments.drawing import figure, memory
from experiments.drawing.timeline import as_text, timeline
from jaxckpt.planner.result import FitResult
from jaxckpt.plans import Plan

_BLOCKS, _RESULT = 32, ".json"


def draw(
    plan: Annotated[
        str, Parameter(help="A checkpointing plan, such as binomial:4. Or a file of a result.")
    ],
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
    if out is not None:
        files.check_output(out, (".txt", *plotting.FIGURES))
    if plan.endswith(_RESULT):
        if blocks is not None:
            raise ConfigError("--blocks is for a plan; a result's file has its own stages")
        result = _result(Path(plan))
        line = memory.timeline(result.rows)
        text = lambda columns: memory.as_text(line, result.unit)
        drawn = lambda: memory.draw(line, f"{len(result.rows)} stages", result.unit)
    else:
        parsed = Plan.parse(plan)
        if blocks is not None:
            check_least(1, blocks=blocks)
        schedule = timeline(parsed.bind(blocks or parsed.num_blocks or _BLOCKS))
        text, drawn = (lambda columns: as_text(schedule, columns)), lambda: figure.draw(schedule)
    if out is None:
        print(text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    elif out.suffix.lower() == ".txt":
        files.write_text(out, f"{text(None)}\n\n{files.MARK}\n")
    else:
        plotting.save(drawn(), out)


def _result(path: Path) -> FitResult:
    """Returns the planner's answer that a file holds; raises `ConfigError` for another file."""
    try:
        return FitResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {files.reason(error)}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{str(path)!r} is no result of jaxckpt.fit; write one by "
            "json.dump(result.as_json(), file)"
        ) from None


if __name__ == "__main__":
    main(draw)
