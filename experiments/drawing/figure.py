"""A timeline as a matplotlib figure: time across, blocks up, held values shaded."""

import textwrap
from typing import Any

from experiments import plotting
from experiments.drawing import timeline as t
from experiments.drawing.timeline import Timeline

# Runs are told apart by lightness too: blue is dark, orange light, green between the two.
_STYLES = {
    t.FORWARD: ("forward", plotting.BLUE),
    t.RECOMPUTE: ("recomputed", plotting.ORANGE),
    t.BACKWARD: ("backward", plotting.GREEN),
    t.CARRY: ("carry held", "#D9D9D9"),
    t.RESIDUALS: ("residuals held", "#9C9C9C"),
}
_WIDTH_INCHES = 11


def draw(line: Timeline):
    """Returns the figure."""
    plotting.import_matplotlib()
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  an extra

    blocks = line.plan.bound_count
    texts = (t.counts(line), *t.policy_words(line.plan))
    notes = [part for text in texts for part in textwrap.wrap(text, width=150)]
    height = min(9.0, 2.2 + 0.14 * blocks) + 0.2 * len(notes)
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    axes = figure.add_subplot()
    for kind in (t.CARRY, t.RESIDUALS, t.FORWARD, t.RECOMPUTE, t.BACKWARD):
        _add_spans(axes, [span for span in (*line.held, *line.runs) if span.kind == kind], kind)
    axes.axvline(line.loss_time, color=plotting.BLACK, linewidth=0.9, linestyle="--")
    axes.annotate("loss", (line.loss_time, blocks - 0.5), xytext=(3, 2), textcoords="offset points")
    axes.set_xlim(0, line.end)
    axes.set_ylim(-0.5, blocks - 0.5)
    axes.set_title(textwrap.fill(t.title(line), width=110), loc="left", pad=32)
    axes.set_xlabel("time, in forward passes of one block (a backward pass takes two)")
    axes.set_ylabel("block")
    locator: Any = axes.yaxis.get_major_locator()
    locator.set_params(integer=True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _add_legend(axes)
    figure.supxlabel("\n".join(notes), fontsize=9, x=0.01, ha="left")
    return figure


def _add_spans(axes, spans, kind: str):
    from matplotlib.collections import PolyCollection  # pyright: ignore[reportMissingImports]  an extra

    half = 0.5 if kind in (t.CARRY, t.RESIDUALS) else 0.45
    around = ((0, -half), (0, half), (1, half), (1, -half))
    corners = [[((one.start, one.stop)[end], one.block + y) for end, y in around] for one in spans]
    axes.add_collection(PolyCollection(corners, facecolors=_STYLES[kind][1], linewidths=0))


def _add_legend(axes):
    from matplotlib.patches import Patch  # pyright: ignore[reportMissingImports]  an extra

    patches = [Patch(facecolor=colour, label=text) for text, colour in _STYLES.values()]
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.01), "ncols": len(patches)}
    axes.legend(handles=patches, frameon=False, fontsize=9, **place)
