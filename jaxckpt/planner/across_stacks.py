"""Plans across stacks: parts, and the drafts of several parts under one budget.

Stacks run one after another and are reversed in the opposite order. While stack i is reversed, the
device holds the kept values of earlier stacks. The kept values of later stacks are already freed.
Gradients exist for the parameters of stack i and of later stacks, but not yet of earlier stacks. An
offset counts all gradients, so without the offset:

    peak = max over stacks i of (kept of all j < i) + worst_i - (parameters of all j < i)

Equal stacks that do not wait for each other may begin together. XLA for CPUs then makes zeros for
their kept arrays once and copies the zeros for each stack. So all kept arrays of these stacks, and
the zeros, exist before any of the stacks has run.

Parts are joined one by one. A joint draft is dropped if another joint draft beats it in kept bytes,
worst bytes, seconds, FLOPs and host bytes at once, or if it needs more host memory than is allowed.
This loses no optimum. If more than `MOST` joint drafts are left, near equals are dropped too.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxckpt.costs.roofline import Rates
from jaxckpt.planner.across_blocks import Draft, Piece, draft, drafts, run_of, schedules
from jaxckpt.planner.graphs import Region, region_drafts
from jaxckpt.planner.kinds import PLAIN, Forward, Kind, find_kinds, forward_cost, plain_kinds
from jaxckpt.planner.stacks import Stack, in_place
from jaxckpt.targets.links import HostLink

MOST = 160
# A graph's plan must save this share of the time of a plan in words that needs no more memory.
WORDS_GAIN = 0.05
# The share by which the predicted peak of a function under policies may be too high. On an H200 the
# prediction for an MLP-Mixer under `dots` was a quarter too high.
_DOUBT = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The stacks of a step that follow one plan.

    Figures of "a block" are the sum over one block of each stack.

    Attributes:
      name: The plan's name in `num_blocks`; empty if one plan is for all stacks.
      num_blocks: The number of blocks of each stack, L.
      kinds: The kinds that are worth mixing.
      plain: The kinds that a user would try first.
      forward: The cost of one forward run of a block.
      turns: The number of stacks. They are reversed one after another.
      begins_together: Whether the stacks' kept arrays exist before any stack has run.
      graphs: Drafts of a function's graph, or of a chain's blocks; `with_graphs` sets them.
      region: The function or chain, if all functions that follow the plan are equal; else None.
      share: The share of the part's bytes that one device holds.
      most_bytes: Bytes that JAX keeps of a function under `none`. XLA holds a share of them.
      is_stack: Whether the blocks are equal. The blocks of a chain differ: the figures of a kind
        are then means over the blocks, and a plain draft treats all blocks by one kind.
    """

    name: str = ""
    num_blocks: int
    kinds: tuple[Kind, ...]
    plain: tuple[Kind, ...]
    forward: Forward
    turns: int = 1
    begins_together: bool = False
    graphs: tuple[Draft, ...] = ()
    region: Region | None = None
    share: float = 1.0
    most_bytes: float = 0.0
    is_stack: bool = True

    @classmethod
    def of(cls, name: str, stacks: Sequence[Stack], rates: Rates, host_bytes: float) -> "Part":
        """Costs the blocks of stacks of one length.

        Args:
          name: The plan's name; empty if one plan is for all stacks.
          stacks: The stacks that follow the plan.
          rates: The rates of the chip.
          host_bytes: The most bytes that the stacks may keep on the host.

        Returns:
          The part with its kinds.
        """
        regions = [stack.region for stack in stacks]
        if None not in regions:
            return cls._of_regions(name, stacks, rates)
        kinds, plain = in_place(stacks, lambda: find_kinds(stacks, rates, host_bytes))
        return cls(
            name=name,
            num_blocks=stacks[0].num_blocks,
            kinds=kinds,
            plain=plain,
            forward=in_place(stacks, lambda: forward_cost(stacks, rates)),
            turns=len(stacks),
        )

    @classmethod
    def _of_regions(cls, name: str, stacks: Sequence[Stack], rates: Rates) -> "Part":
        """Costs functions under `checkpoint`, or chains; only equal ones get a graph's drafts."""
        given = [(stack.region, stack.ends) for stack in stacks if stack.region is not None]
        regions = [Region(region, rates, ends) for region, ends in given]
        held_bytes = sum(region.held_bytes for region in regions)
        largest = max(atom.held_bytes for region in regions for atom in region.atoms)
        count, is_chain = stacks[0].num_blocks, bool(stacks[0].ends)
        forward = forward_cost(stacks, rates)
        kinds, most_bytes = plain_kinds(
            stacks,
            rates,
            forward,
            kept_bytes=held_bytes / count,
            live_bytes=largest if is_chain else held_bytes,
            part_bytes=0.0 if is_chain else largest,
            has_kernel=any(region.has_kernel for region in regions),
        )
        return cls(
            name=name,
            num_blocks=count,
            kinds=kinds,
            plain=kinds,
            forward=forward,
            turns=len(stacks),
            region=regions[0] if len({one.opened.graph for one in regions}) == 1 else None,
            most_bytes=count * most_bytes,
            is_stack=False,
        )

    def with_graphs(self, scale: float = 1.0) -> "Part":
        """Returns the part with the drafts of its graph that no plan in words matches.

        Args:
          scale: The bytes that XLA holds of the function, divided by the figure of `costs/held.py`.

        Returns:
          The part with the drafts; the unchanged part if it has no common function.
        """
        if self.region is None:
            return self
        runs = [draft([run_of(kind, self.num_blocks)]) for kind in self.plain]
        none, full = (draft([run_of(self.kind(word), self.num_blocks)]) for word in PLAIN[:2])
        found = region_drafts(self.region, none, full, self.turns, scale=scale, share=self.share)
        graphs = (
            one
            for one in found
            if not any(
                plain.worst_bytes <= one.worst_bytes
                and plain.seconds <= (1 + WORDS_GAIN) * one.seconds
                for plain in runs
            )
        )
        return dataclasses.replace(self, graphs=tuple(graphs))

    def kind(self, schedule: str) -> Kind:
        """Returns the kind `none` or `full`."""
        return next(k for k in self.plain if not k.policies and k.schedule == schedule)

    @property
    def keeping(self) -> Kind:
        """The kind whose policies keep most on the device; `full` if no kind has policies."""
        kinds = (kind for kind in self.kinds if kind.policies and not kind.host_bytes)
        own = max(kinds, key=lambda kind: kind.kept_bytes, default=None)
        return own if own is not None and self.is_stack else self.kind("full")

    def holding(self, more_bytes: float) -> "Part":
        """Returns the part whose reversal holds more bytes under `keeping` and its equals."""
        keeping, live = self.keeping, lambda kind: kind.live_bytes + self.turns * more_bytes

        def change(kind: Kind) -> Kind:
            is_equal = kind.policies and kind.kept_bytes == keeping.kept_bytes
            return dataclasses.replace(kind, live_bytes=max(live(kind), 0.0)) if is_equal else kind

        return self.changed(change) if keeping.policies else self

    def changed(self, change: Callable[[Kind], Kind]) -> "Part":
        """Returns the part with `change` applied to every kind."""
        kinds, plain = (tuple(map(change, found)) for found in (self.kinds, self.plain))
        return dataclasses.replace(self, kinds=kinds, plain=plain)

    @property
    def params_bytes(self) -> float:
        """The bytes of all blocks' parameters."""
        return self.num_blocks * self.kind("full").params_bytes

    def draft(self, *pieces: Piece) -> Draft:
        """Returns the draft of the given stages."""
        return self._in_turns(draft(pieces))

    def drafts(self, link: HostLink | None) -> Iterator[Draft]:
        """Yields every draft of the part.

        Args:
          link: A device's link to the host; None if plans may not use the host.
        """
        if self.is_stack:
            made = drafts(self.kinds, self.forward, self.num_blocks, link)
        else:
            alike = (
                dataclasses.replace(draft([run_of(kind, self.num_blocks)]), doubt=_DOUBT)
                for kind in self.kinds
            )
            made = itertools.chain(alike, self.graphs)
            if self.num_blocks > 1:
                plain = (self.kind("none"), self.kind("full"))
                pieces = schedules(plain, self.forward, self.num_blocks)
                made = itertools.chain(made, (draft([piece]) for piece in pieces))
        return map(self._in_turns, made)

    def plain_drafts(self) -> list[Draft]:
        """Returns one draft for each plain kind."""
        return [self.draft(run_of(kind, self.num_blocks)) for kind in self.plain]

    def _in_turns(self, one: Draft) -> Draft:
        """Returns a draft with the bytes that all stacks hold while one stack is reversed.

        The worst moment is the reversal of the last stack. The residuals of the other stacks still
        exist then, but their gradients do not exist yet. All stacks count as equally large.
        """
        if self.turns == 1:
            return one
        others = (self.turns - 1) / self.turns * (one.kept_bytes - self.params_bytes)
        worst = one.worst_bytes / self.turns + max(others, 0.0)
        if self.begins_together:
            worst = max(worst, one.kept_bytes - self.params_bytes + one.largest_bytes)
        return dataclasses.replace(one, worst_bytes=worst)


def join(parts: Sequence[Part], chosen: Sequence[Draft]) -> Draft:
    """Returns the joint draft of all parts.

    Args:
      parts: The parts, in the order in which their stacks run.
      chosen: One draft of each part.
    """
    names, params = zip(*((part.name, part.params_bytes) for part in parts), strict=True)
    return joined(names, chosen, params)


def joined(names: Sequence[str], chosen: Sequence[Draft], params_bytes: Sequence[float]) -> Draft:
    """Returns the joint draft of one chosen draft per name.

    Args:
      names: The parts' names, in the order in which their stacks run.
      chosen: The chosen draft of each part.
      params_bytes: The bytes of each part's parameters.
    """
    if names[0] == "":  # one plan for all stacks
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
    """Returns the joint drafts that no other joint draft beats in peak, seconds and FLOPs.

    Args:
      names: The parts' names, in the order in which their stacks run.
      drafts: The drafts of each part; at least one draft keeps nothing on the host.
      params_bytes: The bytes of each part's parameters.
      host_bytes: The most bytes that a joint draft may keep on the host.
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
    """Returns the figures of every joint draft so far with every draft of the next part."""
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
    """Returns the places of at most `MOST` rows that no other row beats or equals in all columns.

    The first of several equal rows is kept. If too many rows are left, columns are rounded to a
    coarser grain until few enough are left.
    """
    places = _front(rows, range(len(rows)))
    span = np.ptp(rows[places], axis=0) if len(places) else 0.0
    grain = 1 / 1024
    while len(places) > MOST:
        step = np.maximum(span * grain, 1e-300)
        # Rounded up, so that no plan counts as smaller or faster than it is.
        places = _front(np.ceil(rows / step), places)
        grain *= 2
    return sorted(places)


def _front(rows: np.ndarray, places) -> list[int]:
    """Returns the places, out of `places`, whose rows no other row beats or equals."""
    order = sorted(places, key=lambda place: (*rows[place], place))
    front = np.empty((len(order), rows.shape[1]))
    found: list[int] = []
    for place in order:
        if not (front[: len(found)] <= rows[place]).all(axis=1).any():
            front[len(found)] = rows[place]
            found.append(place)
    return found
