"""Plans of several stacks together: which of them are worth a thought under one budget.

Stacks run one after another and are reversed in the opposite order. When the last one has run, all
that all stacks keep is there. While a stack is reversed, what the stacks before it keep is still
there, what those after it kept is gone, and of the gradients of parameters its own and those of
later stacks are there:

    peak = max over stacks i of (kept of all j < i) + worst_i - (parameters of all j < i)

beside an offset that has all gradients in it. Of each stack's plans only those count that no other
beats in bytes kept, worst bytes, seconds, FLOPs and bytes on the host at once; stacks are joined
one by one and what is beaten, or more than the host may hold, is dropped, which loses no optimum.
Above `MOST` such plans near equals are dropped too.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxckpt.planner.across_blocks import Draft
from jaxckpt.plans import Stage
from jaxckpt.plans.plan_set import PlanSet

MOST = 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint:
    """A plan for each stack with the figures of all; reads like a `Draft`.

    Attributes:
      names: Of the stacks, in the order in which they run.
      drafts: Their plans.
      params_bytes: Of all blocks of each stack.
    """

    names: tuple[str, ...]
    drafts: tuple[Draft, ...]
    params_bytes: tuple[float, ...]

    @property
    def plan(self) -> PlanSet:
        """The plans by name."""
        return PlanSet({n: d.plan for n, d in zip(self.names, self.drafts, strict=True)})

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of all plans."""
        return tuple(stage for one in self.drafts for stage in one.stages)

    @property
    def family(self) -> tuple:
        """Those of the plans."""
        return tuple(one.family for one in self.drafts)

    @property
    def kept_bytes(self) -> float:
        """All that is kept when the last stack has run."""
        return sum(one.kept_bytes for one in self.drafts)

    @property
    def worst_bytes(self) -> float:
        """The most that is kept and held while a stack is reversed."""
        before, worst = 0.0, -np.inf
        for one, params in zip(self.drafts, self.params_bytes, strict=True):
            worst = max(worst, before + one.worst_bytes)
            before += one.kept_bytes - params
        return worst

    @property
    def host_bytes(self) -> float:
        """On the host."""
        return sum(one.host_bytes for one in self.drafts)

    @property
    def seconds(self) -> float:
        """Of all stacks."""
        return sum(one.seconds for one in self.drafts)

    @property
    def flops(self) -> float:
        """Of all stacks."""
        return sum(one.flops for one in self.drafts)


def joints(
    names: Sequence[str],
    drafts: Sequence[Sequence[Draft]],
    params_bytes: Sequence[float],
    host_bytes: float = 0.0,
) -> list[Joint]:
    """Returns the joint plans that no other beats in peak, seconds and FLOPs.

    Args:
      names: Of the stacks, in the order in which they run.
      drafts: Each stack's plans, some of which move nothing.
      params_bytes: Of all blocks of each stack.
      host_bytes: What all plans together may have on the host.
    """
    # Columns: bytes before the next stack, worst bytes, seconds, FLOPs, bytes on the host.
    rows = np.array([[0.0, -np.inf, 0.0, 0.0, 0.0]])
    chosen: list[tuple[Draft, ...]] = [()]
    for own, params in zip(drafts, params_bytes, strict=True):
        own, figures = _unbeaten([one for one in own if one.host_bytes <= host_bytes])
        joined = _join(rows, figures, params)
        allowed = np.flatnonzero(joined[:, -1] <= host_bytes)
        kept = [int(allowed[place]) for place in unbeaten(joined[allowed])]
        pairs = [divmod(place, len(own)) for place in kept]
        rows, chosen = joined[kept], [(*chosen[a], own[b]) for a, b in pairs]
    return [
        Joint(names=tuple(names), drafts=one, params_bytes=tuple(params_bytes)) for one in chosen
    ]


def _join(rows: np.ndarray, figures: np.ndarray, params: float) -> np.ndarray:
    """Returns the figures of every row with every plan of the next stack."""
    before, worst, *others = (column[:, None] for column in rows.T)
    kept, own_worst, *own_others = figures.T
    sums = (a + b for a, b in zip(others, own_others, strict=True))
    columns = (before + kept - params, np.maximum(worst, before + own_worst), *sums)
    return np.stack(np.broadcast_arrays(*columns), axis=-1).reshape(-1, rows.shape[1])


def _unbeaten(drafts: Sequence[Draft]) -> tuple[list[Draft], np.ndarray]:
    drafts = sorted(drafts, key=lambda one: len(one.stages))
    figures = lambda d: [d.kept_bytes, d.worst_bytes, d.seconds, d.flops, d.host_bytes]
    rows = np.array(list(map(figures, drafts)))
    kept = unbeaten(rows)
    return [drafts[place] for place in kept], rows[kept]


def unbeaten(rows: np.ndarray) -> list[int]:
    """Returns the places of the rows that no other beats or equals in all columns, at most `MOST`.

    Of equal rows the first is kept. Where more are left, columns are rounded, coarser and coarser.
    """
    places = _front(rows, range(len(rows)))
    span = np.ptp(rows[places], axis=0) if len(places) else 0.0
    grain = 1 / 1024
    while len(places) > MOST:
        step = np.maximum(span * grain, 1e-300)
        # Up, so that a plan is never taken for smaller or faster than it is.
        places = _front(np.ceil(rows / step), places)
        grain *= 2
    return sorted(places)


def _front(rows: np.ndarray, places) -> list[int]:
    """Returns those of some places whose rows no other of them beats or equals."""
    order = sorted(places, key=lambda place: (*rows[place], place))
    front = np.empty((len(order), rows.shape[1]))
    found: list[int] = []
    for place in order:
        if not (front[: len(found)] <= rows[place]).all(axis=1).any():
            front[len(found)] = rows[place]
            found.append(place)
    return found
