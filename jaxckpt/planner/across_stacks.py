"""Plans of several stacks together: which of them are worth a thought under one budget.

Stacks run one after another and are reversed in the opposite order. When the last one has run, all
that all stacks keep is there. While a stack is reversed, what the stacks before it keep is still
there, what those after it kept is gone, and of the gradients of parameters its own and those of
later stacks are there:

    peak = max over stacks i of (kept of all j < i) + worst_i - (parameters of all j < i)

beside an offset that has all gradients in it. Equal stacks under one plan may begin together, where
none waits for another. XLA for CPUs makes the zeros that their arrays begin with once and copies
them for each stack: then all that they will keep is there before any has run, and one more such
array. Of each stack's plans only those count that no other
beats in bytes kept, worst bytes, seconds, FLOPs and bytes on the host at once; stacks are joined
one by one and what is beaten, or more than the host may hold, is dropped, which loses no optimum.
Above `MOST` such plans near equals are dropped too.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxckpt.costs.roofline import Rates
from jaxckpt.planner.across_blocks import Draft, Piece, draft, drafts, run_of
from jaxckpt.planner.kinds import Forward, Kind, find_kinds, forward_cost
from jaxckpt.planner.stacks import Stack
from jaxckpt.targets.links import HostLink

MOST = 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The stacks of a step that follow one plan.

    Attributes:
      name: As `step_for` knows the plan; empty where there is one for all.
      num_blocks: L.
      kinds: Ways to treat a block that are worth mixing; a block of each stack is one here.
      plain: Those that a user would try first.
      forward: The cost of one more run of a block.
      turns: Stacks, which are reversed one after another.
      begins_together: Whether what they keep is there before any has run.
    """

    name: str = ""
    num_blocks: int
    kinds: tuple[Kind, ...]
    plain: tuple[Kind, ...]
    forward: Forward
    turns: int = 1
    begins_together: bool = False

    @classmethod
    def of(cls, name: str, stacks: Sequence[Stack], rates: Rates, host_bytes: float) -> "Part":
        """Costs the blocks of stacks of one length; `host_bytes` are what they may have there."""
        kinds, plain = find_kinds(stacks, rates, host_bytes)
        return cls(
            name=name,
            num_blocks=stacks[0].num_blocks,
            kinds=kinds,
            plain=plain,
            forward=forward_cost(stacks, rates),
            turns=len(stacks),
        )

    def kind(self, schedule: str) -> Kind:
        """Returns the kind `none` or `full`."""
        return next(k for k in self.plain if not k.policies and k.schedule == schedule)

    def changed(self, change: Callable[[Kind], Kind]) -> "Part":
        """Returns the part with every kind changed."""
        kinds, plain = (tuple(map(change, found)) for found in (self.kinds, self.plain))
        return dataclasses.replace(self, kinds=kinds, plain=plain)

    @property
    def params_bytes(self) -> float:
        """Parameters of all blocks."""
        return self.num_blocks * self.kind("full").params_bytes

    def draft(self, *pieces: Piece) -> Draft:
        """Returns the plan of some stages."""
        return self._in_turns(draft(pieces))

    def drafts(self, link: HostLink | None) -> Iterator[Draft]:
        """Yields every plan worth a thought; without a link, those that move no carries."""
        return map(self._in_turns, drafts(self.kinds, self.forward, self.num_blocks, link))

    def plain_drafts(self) -> list[Draft]:
        """Returns the plans that a user would try first."""
        return [self.draft(run_of(kind, self.num_blocks)) for kind in self.plain]

    def _in_turns(self, one: Draft) -> Draft:
        """Returns a plan with what its stacks hold together while one of them is reversed.

        Each is taken for an equal share of all: while the last one is reversed, all that the
        others keep is there, and their gradients are not.
        """
        if self.turns == 1:
            return one
        others = (self.turns - 1) / self.turns * (one.kept_bytes - self.params_bytes)
        worst = one.worst_bytes / self.turns + max(others, 0.0)
        if self.begins_together:
            worst = max(worst, one.kept_bytes - self.params_bytes + one.largest_bytes)
        return dataclasses.replace(one, worst_bytes=worst)


def join(parts: Sequence[Part], chosen: Sequence[Draft]) -> Draft:
    """Returns the plan of all parts, from one of each."""
    names, params = zip(*((part.name, part.params_bytes) for part in parts), strict=True)
    return joined(names, chosen, params)


def joined(names: Sequence[str], chosen: Sequence[Draft], params_bytes: Sequence[float]) -> Draft:
    """Returns the plan of stacks that run one after another; arguments as of `joints`."""
    if names[0] == "":  # one plan for all
        return chosen[0]
    before, worst = 0.0, -np.inf
    for one, params in zip(chosen, params_bytes, strict=True):
        worst = max(worst, before + one.worst_bytes)
        before += one.kept_bytes - params
    return Draft(
        stages=tuple(stage for one in chosen for stage in one.stages),
        by_name=tuple(zip(names, chosen, strict=True)),
        kept_bytes=sum(one.kept_bytes for one in chosen),
        worst_bytes=worst,
        host_bytes=sum(one.host_bytes for one in chosen),
        seconds=sum(one.seconds for one in chosen),
        flops=sum(one.flops for one in chosen),
    )


def joints(
    names: Sequence[str],
    drafts: Sequence[Sequence[Draft]],
    params_bytes: Sequence[float],
    host_bytes: float = 0.0,
) -> list[Draft]:
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
        sums = _join(rows, figures, params)
        allowed = np.flatnonzero(sums[:, -1] <= host_bytes)
        kept = [int(allowed[place]) for place in unbeaten(sums[allowed])]
        pairs = [divmod(place, len(own)) for place in kept]
        rows, chosen = sums[kept], [(*chosen[a], own[b]) for a, b in pairs]
    return [joined(names, one, params_bytes) for one in chosen]


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
