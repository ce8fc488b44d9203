"""The report as a matplotlib figure: memory against time, memory against depth, losses."""

from collections.abc import Sequence
from typing import Any

from experiments import plotting
from experiments.reporting.groups import Group, Line

_DASHES = ("-", "--", ":", "-.", (0, (9, 2, 2, 2)), (0, (2, 4)), (0, (5, 1, 1, 1)))
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")


def draw(groups: Sequence[Group], lines: Sequence[Line], title: str):
    """Returns the figure of the group with the most plans; its title counts the other groups."""
    plotting.import_matplotlib()
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  an extra

    group = groups[0]
    mine = [line for line in lines if line.family == group.family]
    losses = any(point.losses for point in group.points)
    panels = 1 + bool(mine) + losses
    figure = Figure(figsize=(6.2 * panels, 5.4), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    others = f" ({len(groups) - 1} more on the page)" if len(groups) > 1 else ""
    # A dollar sign would be taken for mathematics.
    figure.suptitle(f"{title}: {group.name}{others}".replace("$", r"\$"))
    styles = _styles(groups)
    _draw_time(axes.pop(0), group, styles)
    if mine:
        _draw_depth(axes.pop(0), mine, styles)
    if losses:
        _draw_losses(axes.pop(0), group, styles)
    return figure


def _styles(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Returns a colour, a mark and a dash for each plan, for all panels."""
    plans = dict.fromkeys(point.plan for group in groups for point in group.points)
    looks = {"color": plotting.CYCLE, "marker": _MARKS, "linestyle": _DASHES}
    return {
        plan: {name: look[number % len(look)] for name, look in looks.items()}
        for number, plan in enumerate(plans)
    }


def _draw_time(axes, group: Group, styles):
    front = [group.points[place] for place in group.frontier]
    if front:
        peaks = [point.peak_bytes / 2**30 for point in front]
        times = [1e3 * (point.step_seconds or 0.0) for point in front]
        axes.step(peaks, times, where="post", color="#767676", linestyle=":")
    for point in group.points:
        if point.step_seconds is not None:
            at = point.peak_bytes / 2**30, 1e3 * point.step_seconds
            style = styles[point.plan] | {"linestyle": "none"}
            axes.plot(*at, markersize=8, label=point.plan, **style)
    sources = sorted({point.seconds_source for point in group.points})
    axes.set_xlabel("compiled peak, GiB")
    axes.set_ylabel(f"step time, ms ({', '.join(sources)})")
    axes.set_title("memory against time, dotted: the frontier", fontsize=10)
    _add_legend(axes)


def _draw_depth(axes, lines: Sequence[Line], styles):
    whole = [line for line in lines if line.temp_slope is not None]
    for line in whole or lines:
        slope, sizes = (line.temp_slope, line.temps) if whole else (line.peak_slope, line.peaks)
        label = f"{line.plan}, slope {slope:.2f}"
        axes.plot(line.depths, [size / 2**30 for size in sizes], label=label, **styles[line.plan])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({depth for line in lines for depth in line.depths})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("blocks")
    axes.set_ylabel(f"{'temporaries' if whole else 'compiled peak'}, GiB")
    axes.set_title("memory against depth", fontsize=10)
    _add_legend(axes)


def _draw_losses(axes, group: Group, styles):
    runs = [point for point in group.points if point.losses]
    for number, point in enumerate(runs):
        steps = range(1, len(point.losses) + 1)
        # Equal curves cover one another; the lower curve is wider, so that both are seen.
        style = styles[point.plan] | {"marker": None, "linestyle": "-"}
        width = 1.5 + 1.2 * (len(runs) - 1 - number)
        losses = [float("nan") if loss is None else loss for loss in point.losses]
        axes.plot(steps, losses, linewidth=width, label=point.plan, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per token")
    axes.set_title("losses", fontsize=10)
    _add_legend(axes)


def _add_legend(axes):
    """Names the plans below a panel, where the legend hides no mark or line."""
    if axes.get_legend_handles_labels()[1]:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
        axes.legend(fontsize=8, frameon=False, **place)
