"""Climbing down the ladder: compile a rung, read its peak, correct the prediction, go on.

What is looked for is the fastest rung whose compiled peak is within the budget, with the rung
before it compiled too, as the proof that it does not fit. Peaks that are known tell how far
predictions are off: of a plan of the same family by the error nearest to it; of a family of which
nothing is compiled yet, the first that may fit is compiled. Compilations are counted; when only
one is left and nothing is known to fit, it goes to the rung with the least peak: a budget that this
peak is within is never refused.

The ladder: of all plans those worth compiling, from the fastest to the one with the least peak.

Each rung is slower than the one before and needs less memory. Beside them stand the plans of one
stage that no other of one stage beats: a compiler can give stages of unequal length more memory
than any model knows of, and where it does, the next best plan is one that treats all blocks alike.
The ladder depends on the step alone, never on a budget: a budget only says how far to climb down,
which is why a smaller budget never gets a plan with a larger peak.

Speed is the roofline's, with one rule above it: a plan never recomputes more matrix products than
a plain plan (`none`, `full`, `dots`, ...) of the same peak or less. Seconds that differ by less
than the model can tell count as equal; then the plan that recomputes less goes first.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxckpt.planner.across_blocks import Draft

# Seconds closer than this are equal to the model.
_PRECISION = 0.002
# Rungs closer than this in peak are one: compiled peaks of such plans may be in either order.
_LEAST_STEP = 0.004


def ladder(rungs: Iterable[Draft], plain: Sequence[Draft]) -> tuple[Draft, ...]:
    """Returns the rungs that no other beats, fastest first.

    Args:
      rungs: Candidates.
      plain: Fixed plans that a user would try first; they set the bounds on recomputation.
    """
    levels = sorted({rung.flops for rung in plain})

    def rank(rung: Draft) -> tuple:
        above = sum(level < rung.flops * (1 - 1e-9) for level in levels)
        speed = math.ceil(math.log(rung.seconds) / math.log1p(_PRECISION))
        # What is equal in all of these stays in the order in which it was given.
        return above, speed, len(rung.stages), -rung.worst_bytes, rung.predicted_bytes

    ranked = sorted(rungs, key=rank)
    found = _thinned(_falling(ranked))
    # Of tens of thousands: told apart by identity, for comparing their values takes seconds.
    place = {id(rung): n for n, rung in enumerate(ranked)}
    ranked = ranked[: 1 + place[id(found[-1])]]
    alike = _thinned(_falling(rung for rung in ranked if not rung.is_mixed))
    kept = {id(rung): rung for rung in (*found, *alike)}.values()
    return tuple(sorted(kept, key=lambda rung: place[id(rung)]))


def _falling(rungs: Iterable[Draft]) -> list[Draft]:
    """Drops rungs that need no less than one before them."""
    kept: list[Draft] = []
    for rung in rungs:
        if not kept or rung.predicted_bytes < kept[-1].predicted_bytes:
            kept.append(rung)
    return kept


def _thinned(rungs: Sequence[Draft]) -> Sequence[Draft]:
    """Drops rungs that save next to nothing; the first and the last stay."""
    if not rungs:
        return rungs
    kept = [rungs[0]]
    for rung in rungs[1:]:
        if rung.predicted_bytes < (1 - _LEAST_STEP) * kept[-1].predicted_bytes:
            kept.append(rung)
    if kept[-1] is not rungs[-1]:
        if len(kept) > 1:
            kept.pop()
        kept.append(rungs[-1])
    return kept


# How far off the first prediction of a family may be. Too high a one would pass over a plan that
# fits, too low a one costs a compilation that tells of the whole family.
_DOUBT = 0.02
# What the last compilation must have to spare where there is an answer already: a little for a plan
# that treats all blocks alike, more for others, whose peaks are harder to tell.
_SAFE, _SAFE_MIXED = 0.01, 0.04


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search knows at its end.

    Attributes:
      chosen: Place of the fastest rung that is known to fit, or None if none is.
      peaks: Compiled peaks by place.
    """

    chosen: int | None
    peaks: dict[int, int]


def search(
    rungs: Sequence[Draft],
    budget: int,
    compile_peak: Callable[[int], int],
    known: dict[int, int],
    compiles: int,
    *,
    is_answered: bool = False,
) -> Found:
    """Returns the fastest rung within a budget.

    Args:
      rungs: The ladder.
      budget: In bytes.
      compile_peak: Returns the compiled peak of the rung at a place.
      known: Compiled peaks of some places.
      compiles: How many more may be compiled.
      is_answered: Whether a plan that is on no rung is known to fit.
    """
    state = _Search(rungs=rungs, budget=budget, peaks=dict(known), is_answered=is_answered)
    for left in range(compiles, 0, -1):
        place = state.next_place(left)
        if place is None:
            break
        state.peaks[place] = compile_peak(place)
    return Found(chosen=state.fitting, peaks=state.peaks)


@dataclasses.dataclass(kw_only=True)
class _Search:
    """Compiled peaks so far, and where to look next."""

    rungs: Sequence[Draft]
    budget: int
    peaks: dict[int, int]
    is_answered: bool

    @property
    def fitting(self) -> int | None:
        """The fastest place that is known to fit."""
        return min((i for i, peak in self.peaks.items() if peak <= self.budget), default=None)

    def next_place(self, left: int) -> int | None:
        """Returns the place to compile next, or None when there is nothing left to learn."""
        high, last = self.fitting, len(self.rungs) - 1
        if high is None and last in self.peaks:
            return None
        if high is None and left == 1:
            safe = (i for i in range(last) if self.is_answered and self.is_safe(i))
            return next(safe, last)
        unknown = [i for i in range(last + 1 if high is None else high) if i not in self.peaks]
        hopeful = [i for i in unknown if self.corrected(i) <= self.budget]
        alike = [i for i in hopeful if not self.rungs[i].is_mixed]
        if high is None and left == 2 and alike:
            return alike[0]
        if hopeful:
            return hopeful[0]
        if high is None:
            return unknown[-1]
        # The proof that nothing faster fits, as far as peaks follow their predictions.
        return high - 1 if high - 1 in unknown else None

    def is_safe(self, place: int) -> bool:
        """Returns whether a rung that is not compiled is nearly sure to fit."""
        margin = _SAFE_MIXED if self.rungs[place].is_mixed else _SAFE
        return place not in self.peaks and self.expected(place) <= (1 - margin) * self.budget

    def corrected(self, place: int) -> float:
        """Returns the peak to go by: what is expected, less the doubt of an unknown family."""
        family = self.rungs[place].family
        is_known = any(self.rungs[i].family == family for i in self.peaks)
        return self.expected(place) * (1 if is_known else 1 - _DOUBT)

    def expected(self, place: int) -> float:
        """Returns a predicted peak, corrected by what is known of its family."""
        rung = self.rungs[place]
        same = sorted(i for i in self.peaks if self.rungs[i].family == rung.family)
        errors = [self.peaks[i] / self.rungs[i].predicted_bytes for i in same]
        return rung.predicted_bytes * (float(np.interp(place, same, errors)) if same else 1.0)
