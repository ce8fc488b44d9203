"""Draws the bytes that a planner's answer and `none` hold over a step, as text and as a figure.

    line = timeline(result.rows)          # of a `jaxckpt.fit` result
    print(as_text(line, result.unit))

Bytes are what the answer's stages hold by the planner's model. The arguments, the gradients and the
rest of the step are left out. All stages run forward, and then they are reversed from the last to
the first. A reversal recomputes the values that the stage did not keep. Its backward pass counts
as two forward passes. No JAX import.
"""

import dataclasses
from collections.abc import Sequence

from experiments import plotting
from experiments.config import ConfigError
from jaxckpt.planner.result import Row
from jaxckpt.units import in_unit

_BACKWARD_TIME = 2
_BAR = 32  # columns of the longest bar
_LONGEST = 40  # the most letters of a stage in a line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """One stage's forward pass, or its reversal.

    Attributes:
      label: `"forward"` or `"backward"`, and the stage.
      lines: The stage's lines in the user's code.
      plan_bytes: The bytes that all stages hold under the plan, at the end of the forward pass or
        during the reversal.
      none_bytes: The bytes that all stages hold under `none`, at the end of the forward pass or
        during the reversal.
      plan_seconds: Seconds under the plan.
      none_seconds: Seconds under `none`.
    """

    label: str
    lines: str
    plan_bytes: int
    none_bytes: int
    plan_seconds: float
    none_seconds: float


def timeline(rows: Sequence[Row]) -> tuple[Moment, ...]:
    """Returns the moments of a step: each stage's forward pass, then each stage's reversal.

    Args:
      rows: The rows of a `FitResult`.

    Raises:
      ConfigError: A stage has a schedule, whose carries come and go.
    """
    for row in rows:
        if row.kept_bytes is None:
            raise ConfigError(
                f"{row.stage} is a schedule of a stack; draw it by its plan, such as "
                f"python -m experiments.draw {row.stage}"
            )
    moments, plan, none = [], 0, 0
    for row in rows:
        plan, none = plan + (row.kept_bytes or 0), none + row.none_bytes
        moments.append(_moment("forward", row, plan, none))
    for row in reversed(rows):
        moments.append(_moment("backward", row, plan + row.held_bytes, none))
        plan, none = plan - (row.kept_bytes or 0), none - row.none_bytes
    return tuple(moments)


def _moment(word: str, row: Row, plan_bytes: int, none_bytes: int) -> Moment:
    is_back = word == "backward"
    seconds = row.seconds * (_BACKWARD_TIME if is_back else 1)
    stage = row.stage if len(row.stage) <= _LONGEST else f"{row.stage[: _LONGEST - 3]}..."
    return Moment(
        label=f"{word:8} {f'{row.name}: ' if row.name else ''}{stage}",
        lines=row.lines,
        plan_bytes=plan_bytes,
        none_bytes=none_bytes,
        plan_seconds=seconds + is_back * row.again_seconds,
        none_seconds=seconds,
    )


def as_text(line: Sequence[Moment], unit: str = "") -> str:
    """Returns a line for each moment: the bytes under the plan and under `none`, and bars.

    Args:
      line: The moments, from `timeline`.
      unit: The unit of bytes; empty for units that fit the sizes.
    """
    most = max(max(one.plan_bytes, one.none_bytes) for one in line) or 1
    width = max(len(one.label) for one in line)
    size = lambda nbytes: f"{in_unit(nbytes, unit):>12}"
    found = [f"{'':{width}} {'the plan':>12} {'none':>12}   # held under the plan  . under none"]
    for one in line:
        plan, none = (round(_BAR * x / most) for x in (one.plan_bytes, one.none_bytes))
        bar = "#" * plan + "." * (none - plan)
        text = f"{one.label:{width}} {size(one.plan_bytes)} {size(one.none_bytes)}   {bar:{_BAR}}"
        found.append(f"{text}  {one.lines}".rstrip())
    return "\n".join([*found, peaks(line, unit)])


def peaks(line: Sequence[Moment], unit: str = "") -> str:
    """Returns a text: the most bytes held under the plan and under `none`, and the time of each.

    Args:
      line: The moments, from `timeline`.
      unit: The unit of bytes; empty for units that fit the sizes.
    """
    ways = []
    for word in ("plan", "none"):
        most = max(getattr(one, f"{word}_bytes") for one in line)
        seconds = sum(getattr(one, f"{word}_seconds") for one in line)
        ways.append(f"{in_unit(most, unit)} at most in {seconds * 1e3:.3f} ms")
    return f"the plan holds {ways[0]}, none {ways[1]}, beside the rest of the step"


def draw(line: Sequence[Moment], title: str, unit: str = ""):
    """Returns the figure of held bytes over time, with the plan drawn over `none`.

    Args:
      line: The moments, from `timeline`.
      title: The figure's title.
      unit: The unit of bytes; empty for a unit that fits the sizes.
    """
    plotting.import_matplotlib()
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  an extra

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    most = max(max(one.plan_bytes, one.none_bytes) for one in line)
    unit = unit or in_unit(most).partition(" ")[2]
    scale = float(in_unit(2**60, unit).partition(" ")[0]) / 2**60
    for word, colour, label in (
        ("none", plotting.SKY, "none"),
        ("plan", plotting.ORANGE, "the plan"),
    ):
        edges, heights = [0.0], []
        for one in line:
            edges.append(edges[-1] + 1e3 * getattr(one, f"{word}_seconds"))
            heights.append(scale * getattr(one, f"{word}_bytes"))
        axes.stairs(heights, edges, color=colour, linewidth=1.6, label=label)
        axes.stairs(heights, edges, color=colour, fill=True, alpha=0.25)
    axes.axvline(
        1e3 * sum(one.plan_seconds for one in line[: len(line) // 2]),
        color=plotting.BLACK,
        linewidth=0.9,
        linestyle="--",
    )
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("time by the roofline, ms (dashed: the loss)")
    axes.set_ylabel(f"held for the backward pass, {unit}")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.supxlabel(peaks(line, unit), fontsize=9, x=0.01, ha="left")
    return figure
