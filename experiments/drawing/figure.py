"""A timeline as a matplotlib figure: time across, blocks up, what is held shaded behind."""

import textwrap
from typing import Any

from experiments import plotting
from experiments.drawing import timeline as t
from experiments.drawing.timeline import Timeline

# Runs are told apart by lightness too: blue is dark, orange light, green between the two.
_COLOURS = {
    t.CARRY: "#D9D9D9",
    t.RESIDUALS: "#9C9C9C",
    t.FORWARD: plotting.BLUE,
    t.RECOMPUTE: plotting.ORANGE,
    t.BACKWARD: plotting.GREEN,
}
_LABELS = {
    t.FORWARD: "forward",
    t.RECOMPUTE: "recomputed",
    t.BACKWARD: "backward",
    t.CARRY: "carry held",
    t.RESIDUALS: "residuals held",
}
_WIDTH_INCHES = 11


def draw(line: Timeline):
    """Returns the figure."""
    plotting.import_matplotlib()
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  an extra

    blocks = line.plan.bound_count
    notes = _notes(line)
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
    corners = [
        (
            (one.start, one.block - half),
            (one.start, one.block + half),
            (one.stop, one.block + half),
            (one.stop, one.block - half),
        )
        for one in spans
    ]
    axes.add_collection(PolyCollection(corners, facecolors=_COLOURS[kind], linewidths=0))


def _add_legend(axes):
    from matplotlib.patches import Patch  # pyright: ignore[reportMissingImports]  an extra

    patches = [Patch(facecolor=_COLOURS[kind], label=text) for kind, text in _LABELS.items()]
    axes.legend(
        handles=patches,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.01),
        ncols=len(patches),
        frameon=False,
        fontsize=9,
    )


def _notes(line: Timeline) -> list[str]:
    texts = (t.counts(line), *t.policy_words(line.plan))
    return [part for text in texts for part in textwrap.wrap(text, width=150)]
