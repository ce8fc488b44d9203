"""Groups of comparable points, with their frontier, slopes and loss differences."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from experiments.reporting.points import Point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Points of one depth on one target with equal settings, one for each plan.

    Attributes:
      name: The heading of the group's table.
      family: The name without the depth; groups of a family differ in depth alone.
      points: The points, the smallest peak first.
      frontier: Places in `points` of the plans that no other plan beats in both memory and time.
      ties: For each point, the places of other points whose step times lie within its noise.
      loss_difference: The largest difference of a step's loss between two plans, relative to the
        loss; None with fewer than two curves.
    """

    name: str
    family: str
    points: tuple[Point, ...]
    frontier: tuple[int, ...]
    ties: tuple[tuple[int, ...], ...]
    loss_difference: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A plan's memory against depth.

    Attributes:
      plan: The plan.
      family: The family of the groups that the line goes through.
      depths: Numbers of blocks, ascending.
      peaks: Peak bytes at each depth.
      temps: Temporary bytes at each depth; empty if a size is unknown.
      peak_slope: The slope of log peak over log depth, by least squares; 1 is linear, 0.5 a square
        root.
      temp_slope: The slope of the temporaries; None if they are unknown or zero.
    """

    plan: str
    family: str
    depths: tuple[int, ...]
    peaks: tuple[int, ...]
    temps: tuple[int, ...]
    peak_slope: float
    temp_slope: float | None


def groups_of(points: Sequence[Point]) -> tuple[Group, ...]:
    """Returns the groups, the largest first; a later point replaces an earlier one of its plan."""
    settings = {point.settings for point in points}
    members: dict[tuple[str, int], dict[str, Point]] = {}
    for point in points:
        key = _family(point, len(settings) > 1), point.depth
        members.setdefault(key, {})[point.plan] = point
    found = [_group(family, depth, [*plans.values()]) for (family, depth), plans in members.items()]
    return tuple(sorted(found, key=lambda group: -len(group.points)))


def _family(point: Point, with_settings: bool) -> str:
    chip = f"{point.target} ({point.device})" if point.target == "local" else point.target
    return f"{chip}, {point.settings or 'default settings'}" if with_settings else chip


def _group(family: str, depth: int, points: list[Point]) -> Group:
    points.sort(key=lambda point: (point.peak_bytes, point.plan))
    return Group(
        name=f"{family}, {depth} block{'s' * (depth > 1)}",
        family=family,
        points=tuple(points),
        frontier=frontier(points),
        ties=ties(points),
        loss_difference=loss_difference(points),
    )


def frontier(points: Sequence[Point]) -> tuple[int, ...]:
    """Returns the places of the points that are faster than every point with no larger peak.

    `points` are sorted by peak, the smallest first. A point without a time is left out.
    """
    found, fastest = [], math.inf
    timed = [(p.peak_bytes, p.step_seconds, n) for n, p in enumerate(points) if p.step_seconds]
    for _, seconds, place in sorted(timed):
        if seconds < fastest:
            found.append(place)
            fastest = seconds
    return tuple(found)


def ties(points: Sequence[Point]) -> tuple[tuple[int, ...], ...]:
    """Returns for each point the places of other points whose step time cannot be told apart.

    Two points tie if the middle halves of their step times overlap.
    """

    def meet(one: Point, other: Point) -> bool:
        if one is other or one.step_spread is None or other.step_spread is None:
            return False
        lows, highs = zip(one.step_spread, other.step_spread, strict=True)
        return max(lows) <= min(highs)

    return tuple(
        tuple(place for place, other in enumerate(points) if meet(one, other)) for one in points
    )


def loss_difference(points: Sequence[Point]) -> float | None:
    """Returns the largest relative difference between curves, step by step; None without two."""
    curves = [point.losses for point in points if point.losses]
    if len(curves) < 2:
        return None
    largest = 0.0
    for values in zip(*curves, strict=False):
        if None in values:
            continue
        scale = max(map(abs, values))
        largest = max(largest, (max(values) - min(values)) / scale if scale else 0.0)
    return largest


def lines_of(groups: Sequence[Group]) -> tuple[Line, ...]:
    """Returns a line for each plan that a family has at two depths or more."""
    found: dict[tuple[str, str], dict[int, Point]] = {}
    for group in groups:
        for point in group.points:
            found.setdefault((group.family, point.plan), {})[point.depth] = point
    return tuple(
        _line(family, plan, [by_depth[depth] for depth in sorted(by_depth)])
        for (family, plan), by_depth in found.items()
        if len(by_depth) > 1
    )


def _line(family: str, plan: str, points: list[Point]) -> Line:
    depths = tuple(point.depth for point in points)
    peaks = tuple(point.peak_bytes for point in points)
    temps = tuple(p.temp_bytes for p in points if p.temp_bytes is not None)
    temps = temps if len(temps) == len(points) else ()
    return Line(
        plan=plan,
        family=family,
        depths=depths,
        peaks=peaks,
        temps=temps,
        peak_slope=slope(depths, peaks),
        temp_slope=slope(depths, temps) if temps and min(temps) > 0 else None,
    )


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Returns the slope of log y over log x by least squares; all numbers are above 0."""
    logs = ([math.log(value) for value in values] for values in (xs, ys))
    return statistics.linear_regression(*logs).slope
