"""Plans of one function's graph, or of a chain's blocks: what each segment keeps.

    drafts = region_drafts(Region(block, rates), none, full, turns)  # one for each of a few peaks

The function's steps (`transforms/cuts.py`) are cut where few bytes are alive, into at most `_MOST`
atoms. For each atom the program of `inside_block.py` gives the sets of values that are worth
keeping. A plan is a list of segments, and a segment is a run of atoms. A segment is either `none`,
or it is recomputed except for the values of its sets. The atoms of a chain are its blocks, and each
block is a segment.

A segment that starts at atom s and ends before atom t keeps the values that later atoms read and
the values of its sets, until it is reversed. Its reversal also holds the recomputed values. So

    peak = max over segments of (kept by earlier segments + held by its reversal + alive(t))

where alive(t) stands for the gradients of the values at the cut. Dynamic programming over the cuts
finds the plan within a peak that recomputes for the fewest seconds. It does so for a few peaks,
from the peak of `none` down to the least peak.

Bytes are an estimate, from a jaxpr, of the bytes that XLA will hold (`costs/held.py`). If a segment
recomputes only values that are near their inputs, XLA makes each value when it is needed. If the
whole segment is recomputed, XLA holds all of it. Between the two, the estimate interpolates by the
recomputed share of the work. Compiled peaks correct the rest.

References:
  Beaumont et al. 2019, "Optimal checkpointing for heterogeneous chains" (rotor).
"""

import bisect
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.extend import core

from jaxckpt.costs.flat import Step, where
from jaxckpt.costs.flops import step_flops
from jaxckpt.costs.held import held
from jaxckpt.costs.roofline import Rates
from jaxckpt.planner.across_blocks import Draft
from jaxckpt.planner.inside_block import Graph, Program
from jaxckpt.planner.result import Row
from jaxckpt.planner.stacks import Stack
from jaxckpt.plans import Policy, Stage, words
from jaxckpt.transforms import jaxprs
from jaxckpt.transforms.cuts import Opened
from jaxckpt.transforms.traced_block import TracedBlock, text_of
from jaxckpt.transforms.value_names import counts

_MOST = 48  # the most atoms of a function
_PEAKS = 12  # the number of peaks that plans are made for
_FRONT = 24  # the most states of one cut; a state is a pair of kept bytes and seconds
_SHARES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 64)  # bounds in `_points`, as shares of the bytes
_PRICES = 6  # the number of prices per byte at which each atom chooses its set


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A set of values that an atom keeps when the rest of the atom is recomputed.

    Attributes:
      policies: The policies that keep the values.
      kept_bytes: The bytes of the values.
      seconds: Seconds of recomputation.
      flops: FLOPs of recomputation.
    """

    policies: tuple[Policy, ...] = ()
    kept_bytes: float = 0.0
    seconds: float = 0.0
    flops: float = 0.0


_NOTHING = (Point(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """The costs of an atom, at any place in the function.

    Attributes:
      held_bytes: Bytes that XLA holds of the atom if nothing is recomputed.
      seconds: Seconds of the forward pass.
      last: The atom's sets if it ends a segment, from most kept bytes to least.
      inner: The atom's sets if later atoms of the segment read its results in recomputation.
      names: The number of the atom's invented names, by word.
    """

    held_bytes: float
    seconds: float
    last: tuple[Point, ...]
    inner: tuple[Point, ...]
    names: Counter


def cuts(opened: Opened) -> tuple[int, ...]:
    """Returns the places where a function is cut: step numbers, from 0 to the number of steps."""
    steps, alive = opened.jaxpr.eqns, alive_bytes(opened)
    sizes = [sum(_nbytes(var) for var in step.outvars) for step in steps]
    total = max(sum(sizes), 1)
    done = list(itertools.accumulate((1 / len(steps) + x / total for x in sizes), initial=0.0))
    gap, ends = 2 / _MOST, [done[0], done[-1]]
    chosen = []
    for place in sorted(range(1, len(steps)), key=lambda n: (alive[n], n)):
        # No cut stands between a tag and the value that the tag names.
        if steps[place].primitive.name == jaxprs.TAG:
            continue
        near = bisect.bisect(ends, done[place])
        neighbors = ends[max(near - 1, 0) : near + 1]
        if all(abs(done[place] - other) >= gap for other in neighbors):
            bisect.insort(ends, done[place])
            chosen.append(place)
    return (0, *sorted(chosen), len(steps))


def alive_bytes(opened: Opened) -> list[int]:
    """Returns, for each place before a step, the bytes of earlier results that later steps read."""
    change = [0] * (opened.num_steps + 2)
    for place, step in enumerate(opened.jaxpr.eqns):
        for var in step.outvars:
            last = opened.last_reads.get(var)
            if last is not None and _depends(opened, var):
                change[place + 1] += _nbytes(var)
                change[last + 1] -= _nbytes(var)
    return list(itertools.accumulate(change))


def _depends(opened: Opened, var: core.Var) -> bool:
    """Whether a value depends on an array; XLA can make other values (zeros, masks) anywhere."""
    return var in opened.dependent


def _nbytes(var) -> int:
    shape, dtype = getattr(var.aval, "shape", None), getattr(var.aval, "dtype", None)
    return 0 if shape is None or dtype is None else int(np.prod(shape)) * dtype.itemsize


def _crossing(opened: Opened, at: Sequence[int]) -> np.ndarray:
    """Returns `[atoms, cuts]`: the bytes of an atom's results that are read at or after a cut."""
    found = np.zeros((len(at) - 1, len(at)))
    for place, step in enumerate(opened.jaxpr.eqns):
        atom = bisect.bisect(at, place) - 1
        for var in step.outvars:
            last = opened.last_reads.get(var)
            if last is not None and _depends(opened, var):
                stop = bisect.bisect(at, last)  # cuts at or before the last read
                found[atom, atom + 1 : stop] += _nbytes(var)
    return found


def _figures(block: TracedBlock, rates: Rates) -> Figures:
    if not block.jaxpr.eqns:  # a block of a chain may return its inputs unchanged
        return Figures(held_bytes=0.0, seconds=0.0, last=_NOTHING, inner=_NOTHING, names=Counter())
    carry, _, _ = block.inputs
    stack = Stack(call=block.call, carry=carry, params=[], consts=[], num_blocks=1)
    graph = Graph.of(stack, rates, with_results=True)
    read = dict.fromkeys([*graph.residuals, *graph.results])
    return Figures(
        held_bytes=float(sum(value.nbytes for value in held(read))),
        seconds=sum(graph.seconds),
        last=_points(graph),
        inner=_points(dataclasses.replace(graph, residuals=tuple(read))),
        names=counts(block.jaxpr),
    )


def _points(graph: Graph) -> tuple[Point, ...]:
    """Returns the sets that no other set beats, from most kept bytes to none."""
    if not graph.steps:
        return _NOTHING
    program, found = Program(graph), []
    flops = np.array([float(step_flops(step)) for step in graph.steps])
    most = room = program.all_bytes
    for share in (*_SHARES, 0):
        if found and share and found[-1].kept_bytes <= share * most:
            continue  # the same answer
        room = min(room, share * most)
        solution = program.solve(room)
        assert solution is not None  # recomputing every step is always a solution
        again = np.round(solution.again, 6)
        point = Point(
            policies=solution.policies,
            kept_bytes=solution.used,
            seconds=float(np.dot(again, graph.seconds)),
            flops=float(again @ flops),
        )
        if found and point.seconds <= found[-1].seconds:
            found.pop()
        found.append(point)
        most = solution.used if share == 1 else most
    return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Treatment:
    """A way to treat the atoms of a segment: `none`, or recompute except for each atom's set.

    Attributes:
      is_again: Whether the segment is recomputed.
      last: For each atom, its set if it ends the segment.
      inner: For each atom, its set if it does not end the segment.
    """

    is_again: bool
    last: tuple[Point, ...] = ()
    inner: tuple[Point, ...] = ()


class Region:
    """A function cut into costed atoms; equal atoms are costed once.

    The atoms of a chain are its blocks. Each block is a segment, because a plan of blocks cannot
    join two blocks into one segment.
    """

    def __init__(self, block: TracedBlock, rates: Rates, ends: tuple[int, ...] = ()):
        self.opened = Opened.of(block.jaxpr)
        self.is_chain = bool(ends)
        self.cuts = ends or cuts(self.opened)
        self.atoms: list[Figures] = []
        known: dict[tuple, Figures] = {}
        for start, stop in itertools.pairwise(self.cuts):
            one = self.opened.segment(start, stop).block
            key = text_of(one.jaxpr), tuple(map(str, one.jaxpr.in_avals))
            if key not in known:
                known[key] = _figures(one, rates)
            self.atoms.append(known[key])
        self._crossing = _crossing(self.opened, self.cuts)

    @property
    def held_bytes(self) -> float:
        """Bytes that XLA holds of the function if nothing is recomputed."""
        return sum(atom.held_bytes for atom in self.atoms)

    @property
    def has_kernel(self) -> bool:
        """Whether the function runs an attention kernel whose residuals can be kept."""
        points = itertools.chain(*(atom.last for atom in self.atoms))
        return any(policy.kind == "attention" for point in points for policy in point.policies)

    def treatments(self) -> list[Treatment]:
        """Returns `none`, recomputing everything, and sets of values at several prices per byte."""
        slopes = sorted(
            (less.seconds - more.seconds) / (more.kept_bytes - less.kept_bytes)
            for atom in self.atoms
            for points in (atom.last, atom.inner)
            for more, less in itertools.pairwise(points)
            if more.kept_bytes > less.kept_bytes
        )
        prices = [0.0, *np.quantile(slopes, np.linspace(0, 1, _PRICES))] if slopes else []
        found = [Treatment(is_again=False)]
        for price in (*prices, np.inf):
            choose = lambda points, price=price: (
                points[-1]
                if np.isinf(price)
                else min(points, key=lambda one: one.seconds + 1.0001 * price * one.kept_bytes)
            )
            last = tuple(choose(atom.last) for atom in self.atoms)
            inner = tuple(choose(atom.inner) for atom in self.atoms)
            made = Treatment(is_again=True, last=last, inner=inner)
            if made not in found:
                found.append(made)
        return found

    def plans(self, scale: float = 1.0) -> Iterator["Found"]:
        """Yields plans for falling peaks.

        Args:
          scale: The bytes that XLA holds of the function, divided by `held_bytes`.
        """
        runs = _Runs(self, self.treatments(), self._crossing, scale)
        most, least = runs.most, runs.least
        for peak in np.geomspace(max(most, 1.0), max(least, 1.0), _PEAKS):
            found = runs.solve(peak * (1 + 1e-9))
            if found is not None:
                yield found

    def staged(self, found: "Found") -> list[tuple[Stage, list[int]]]:
        """Returns the stages of a plan, each with the places of its segments.

        Neighboring `none` segments form one stage. Equal neighboring segments of a chain also form
        one stage.
        """
        staged: list[tuple[Stage, list[int]]] = []
        for place, (start, stop, way) in enumerate(found.segments):
            count = stop - start if self.is_chain else self.cuts[stop] - self.cuts[start]
            stage = Stage(count=count, schedule="none")
            if way.is_again:
                policies, seen = [], Counter()
                for atom in range(start, stop):
                    point = (way.last if atom == stop - 1 else way.inner)[atom]
                    policies += [_shifted(policy, seen) for policy in point.policies]
                    seen.update(self.atoms[atom].names)
                stage = Stage(count=count, schedule="full", policies=tuple(policies))
            if staged and (self.is_chain or not way.is_again):
                before, places = staged[-1]
                if dataclasses.replace(before, count=count) == stage:
                    stage = dataclasses.replace(stage, count=count + before.bound_count)
                    staged[-1] = stage, [*places, place]
                    continue
            staged.append((stage, [place]))
        return staged

    def rows(self, found: "Found", *, again: float, held: float, share: float) -> tuple[Row, ...]:
        """Returns the kept bytes, recomputation and source lines of each stage of a plan.

        Args:
          found: The plan.
          again: The factor of all seconds.
          held: The factor of `held_bytes`.
          share: The factor of all bytes.
        """
        rows = []
        for stage, places in self.staged(found):
            start, stop = found.segments[places[0]][0], found.segments[places[-1]][1]
            atoms, shares = self.atoms[start:stop], [found.shares[place] for place in places]
            *before, kept = itertools.accumulate((s.kept_bytes for s in shares), initial=0.0)
            most = max(held + share.live_bytes for held, share in zip(before, shares, strict=True))
            rows.append(
                Row(
                    stage=str(stage),
                    kept_bytes=int(share * kept),
                    held_bytes=int(share * max(most - kept, 0.0)),
                    none_bytes=int(share * held * sum(atom.held_bytes for atom in atoms)),
                    seconds=again * sum(atom.seconds for atom in atoms),
                    again_seconds=again * sum(one.seconds for one in shares),
                    lines=self._lines(self.cuts[start], self.cuts[stop]),
                )
            )
        return tuple(rows)

    def _lines(self, start: int, stop: int) -> str:
        steps = (Step(equation=e, inputs=()) for e in self.opened.jaxpr.eqns[start:stop])
        found = list(filter(None, map(where, steps)))
        if not found:
            return ""
        first, last = found[0], found[-1]
        return first if first == last else f"{first} to {last}"


def _shifted(policy: Policy, seen: Counter) -> Policy:
    """Returns an atom's policy, renumbered for a segment in which other atoms come first.

    Args:
      policy: A policy whose invented names count values of the atom only.
      seen: The number of invented names of the segment's earlier atoms, by word.
    """
    names = []
    for name in policy.names:
        word, _, number = name.rpartition(".")
        before = seen[word.removeprefix(words.INVENTED)] if words.is_invented(name) else 0
        names.append(f"{word}.{int(number) + before}" if before else name)
    return dataclasses.replace(policy, names=tuple(names))


class Share(NamedTuple):
    """A segment's kept bytes, bytes held while it is reversed, and seconds of recomputation."""

    kept_bytes: float
    live_bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A plan of segments.

    Attributes:
      segments: For each segment, its first atom, the atom after its last atom, and its treatment.
      shares: For each segment, its figures.
      kept_bytes: Bytes that all segments keep.
      worst_bytes: The most bytes held while a segment is reversed.
      seconds: Seconds of recomputation.
      flops: FLOPs of recomputation.
    """

    segments: tuple[tuple[int, int, Treatment], ...]
    shares: tuple["Share", ...]
    kept_bytes: float
    worst_bytes: float
    seconds: float
    flops: float


class _Runs:
    """The figures of every run of atoms under every treatment, and the dynamic program over them.

    Attributes:
      most: The peak of `none`.
      least: The least peak of any plan.
    """

    def __init__(
        self, region: Region, ways: Sequence[Treatment], crossing: np.ndarray, scale: float
    ):
        self._ways, atoms = ways, region.atoms
        self._count = count = len(atoms)
        held_ = scale * np.array([atom.held_bytes for atom in atoms])
        ahead = np.array([atom.seconds for atom in atoms])
        alive = crossing.sum(axis=0)
        # [treatment, start, stop]; entries that are not a run stay infinite.
        shape = (len(ways), count, count + 1)
        self._kept, self._live, self._seconds, self._flops = np.full((4, *shape), np.inf)
        for n, way in enumerate(ways):
            for stop in range(1, count + 1):
                first = stop - 1 if region.is_chain else 0
                if not way.is_again:  # a longer `none` run is several runs of one atom
                    self._kept[n, stop - 1, stop] = held_[stop - 1]
                    self._live[n, stop - 1, stop] = held_[stop - 1] + alive[stop]
                    self._seconds[n, stop - 1, stop] = self._flops[n, stop - 1, stop] = 0.0
                    continue
                points = [*way.inner[: stop - 1], way.last[stop - 1]]
                figures = np.array([[p.kept_bytes, p.seconds, p.flops] for p in points])
                kept, seconds, flops = np.cumsum(figures[::-1], axis=0)[::-1].T
                rest = np.maximum(held_[:stop] - figures[:, 0], 0.0)
                total = np.cumsum(rest[::-1])[::-1]
                largest = np.maximum.accumulate(rest[::-1])[::-1]
                whole = np.cumsum(ahead[:stop][::-1])[::-1]
                share = np.clip(seconds / np.maximum(whole, 1e-30), 0.0, 1.0)
                made = share * total + (1 - share) * largest
                out = np.cumsum(crossing[:stop, stop][::-1])[::-1]
                here = slice(first, stop)
                self._kept[n, here, stop] = (kept + out)[here]
                self._live[n, here, stop] = (kept + made + alive[stop])[here]
                self._seconds[n, here, stop] = seconds[here]
                self._flops[n, here, stop] = flops[here]
        before = np.concatenate([[0.0], np.cumsum(held_)])
        self.most = float(max(before[n + 1] + alive[n + 1] for n in range(count)))
        self.least = self._least()

    def _least(self) -> float:
        """Returns the least peak that some plan reaches, by bisection."""
        low, high = 0.0, self.most
        while self.solve(high) is None:
            high *= 2
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (low, middle) if self.solve(middle) is not None else (middle, high)
        return high

    def solve(self, peak: float) -> Found | None:
        """Returns the plan within a peak with the least recomputation; None if no plan fits."""
        # The states of each cut: kept bytes, seconds, FLOPs. `origins` says how each is reached.
        fronts = [np.zeros((1, 3))]
        origins: list[np.ndarray] = [np.zeros((1, 3), int)]  # treatment, start, state at the start
        for stop in range(1, self._count + 1):
            figures, places = [], []
            for start in range(stop):
                states = fronts[start]
                for n in range(len(self._ways)):
                    live = self._live[n, start, stop]
                    fits = np.flatnonzero(states[:, 0] + live <= peak)
                    if len(fits):
                        cost = (self._kept, self._seconds, self._flops)
                        figures.append(states[fits] + [one[n, start, stop] for one in cost])
                        places += [(n, start, state) for state in fits]
            if not figures:
                fronts.append(np.zeros((0, 3)))
                origins.append(np.zeros((0, 3), int))
                continue
            rows, from_ = np.concatenate(figures), np.array(places)
            kept = _front(rows)
            fronts.append(rows[kept])
            origins.append(from_[kept])
        if not len(fronts[-1]):
            return None
        state, stop = int(np.argmin(fronts[-1][:, 1])), self._count
        kept, seconds, flops = fronts[-1][state]
        segments = []
        while stop:
            n, start, before = map(int, origins[stop][state])
            segments.append((n, start, stop))
            state, stop = before, start
        segments.reverse()
        figures = (self._kept, self._live, self._seconds)
        own = [Share(*(float(one[s]) for one in figures)) for s in segments]
        begun = itertools.accumulate((one.kept_bytes for one in own), initial=0.0)
        worst = max(k + one.live_bytes for k, one in zip(begun, own, strict=False))
        return Found(
            segments=tuple((start, stop, self._ways[n]) for n, start, stop in segments),
            shares=tuple(own),
            kept_bytes=float(kept),
            worst_bytes=float(worst),
            seconds=float(seconds),
            flops=float(flops),
        )


def _front(rows: np.ndarray) -> np.ndarray:
    """Returns the places of at most `_FRONT` rows that no row beats in bytes and seconds."""
    order = np.lexsort((rows[:, 1], rows[:, 0]))
    best = np.minimum.accumulate(rows[order, 1])
    first = np.concatenate([[True], rows[order[1:], 1] < best[:-1]])
    found = order[first]
    if len(found) > _FRONT:
        found = found[np.unique(np.linspace(0, len(found) - 1, _FRONT).round().astype(int))]
    return found


def region_drafts(
    region: Region, none: Draft, full: Draft, turns: int, *, scale: float = 1.0, share: float = 1.0
) -> Iterator[Draft]:
    """Yields the drafts of a function's graph, with the figures of all equal functions together.

    Args:
      region: The function.
      none: The draft that recomputes nothing.
      full: The draft that recomputes everything; seconds are scaled to match this draft.
      turns: The number of equal functions that follow the plan.
      scale: The bytes that XLA holds of the function, divided by `region.held_bytes`.
      share: The share of all bytes that one device holds.
    """
    again = turns * sum(atom.inner[-1].seconds for atom in region.atoms)
    slope = max(full.seconds - none.seconds, 0.0) / again if again else 1.0
    seen = set()
    for found in region.plans(scale):
        stages = tuple(stage for stage, _ in region.staged(found))
        if stages in seen or (len(stages) == 1 and not stages[0].policies):  # `none` or `full`
            continue
        seen.add(stages)
        yield Draft(
            stages=stages,
            graph="" if region.is_chain else region.opened.graph,
            rows=region.rows(found, again=slope * turns, held=scale, share=turns * share),
            kept_bytes=share * turns * found.kept_bytes,
            worst_bytes=share * turns * found.worst_bytes,
            host_bytes=0.0,
            seconds=none.seconds + slope * turns * found.seconds,
            flops=none.flops + turns * found.flops,
        )
