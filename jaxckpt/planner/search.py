"""Searches the ladder: chooses the drafts worth compiling, and the drafts to compile for a budget.

**The ladder** is the list of drafts worth compiling, fastest first. Its drafts are called rungs.
Each rung is slower than the rung before it and needs less memory. The ladder also has the drafts of
one stage that no other draft of one stage beats. A compiler may give stages of unequal length more
memory than the model predicts, and then a plan that treats all blocks alike is the next best. The
ladder depends on the step, never on a budget. A budget only decides how far the search climbs down,
so a smaller budget never gets a plan with a larger peak.

The roofline orders plans by speed, but one rule comes first. A plan never recomputes more matrix
products than a plain plan (`none`, `full`, `dots`, ...) whose peak is not larger. Seconds closer
than the model's precision count as equal. Of equally fast plans, the plan with fewer stages comes
first, then the plan that keeps more.

**The search** compiles a rung, reads its peak, corrects the predictions and goes on. It ends at the
fastest rung whose compiled peak fits. The rung before it is compiled too, as the proof that the
faster rung does not fit. The error of the nearest compiled rung of a family corrects the
predictions of that family. If no rung of a family is compiled, the first rung that may fit is
compiled. The number of compilations is limited. If one compilation is left and no rung fits yet,
the rung with the least peak is compiled, so a budget above this peak is never refused. The rung
that will be needed next, if predictions hold, may be compiled at the same time as another rung.
That changes no answer, only the time until the answer.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxckpt.planner.across_blocks import Draft

# Seconds closer than this share count as equal.
_PRECISION = 0.002
# If the peaks of two rungs are closer than this share, one rung is dropped: compiled peaks that
# are so close may have another order.
_LEAST_STEP = 0.004


def ladder(rungs: Iterable[Draft], plain: Sequence[Draft]) -> tuple[Draft, ...]:
    """Returns the rungs that no other rung beats, fastest first.

    Args:
      rungs: All drafts, with predicted peaks.
      plain: Drafts of the plans that a user would try first; these drafts bound recomputation.
    """
    levels = sorted({rung.flops for rung in plain})

    def rank(rung: Draft) -> tuple:
        above = sum(level < rung.flops * (1 - 1e-9) for level in levels)
        speed = math.ceil(math.log(rung.seconds) / math.log1p(_PRECISION))
        # Rungs with equal ranks keep their order.
        return above, speed, len(rung.stages), -rung.worst_bytes, rung.predicted_bytes

    ranked = sorted(rungs, key=rank)
    found = _thinned(_falling(ranked))
    # The keys are identities: comparing tens of thousands of drafts by value takes seconds.
    place = {id(rung): n for n, rung in enumerate(ranked)}
    ranked = ranked[: 1 + place[id(found[-1])]]
    alike = _thinned(_falling(rung for rung in ranked if not rung.is_mixed))
    kept = {id(rung): rung for rung in (*found, *alike)}.values()
    return tuple(sorted(kept, key=lambda rung: place[id(rung)]))


def _falling(rungs: Iterable[Draft]) -> list[Draft]:
    """Returns the rungs that need less memory than all earlier rungs."""
    kept: list[Draft] = []
    for rung in rungs:
        if not kept or rung.predicted_bytes < kept[-1].predicted_bytes:
            kept.append(rung)
    return kept


def _thinned(rungs: Sequence[Draft]) -> Sequence[Draft]:
    """Returns the rungs without rungs that save hardly any memory; the first and last rung stay."""
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


# If another plan fits already, a rung needs this margin to the budget to get the last compilation.
# Peaks of plans with several stages are harder to predict, so such a plan needs a larger margin.
_SAFE, _SAFE_MIXED = 0.01, 0.04


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a search.

    Attributes:
      chosen: The place of the fastest rung that is known to fit; None if no rung fits.
      peaks: The compiled peaks by place.
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
    prepare: Callable[[Sequence[int]], None] = lambda places: None,
) -> Found:
    """Returns the fastest rung within a budget.

    Args:
      rungs: The ladder.
      budget: The budget in bytes.
      compile_peak: Compiles the rung at a place and returns its peak.
      known: The peaks of rungs that are already compiled, by place.
      compiles: The most compilations that the search may still make.
      is_answered: Whether a plan that is not on the ladder is known to fit.
      prepare: Called before a compilation with a list of places: the place to compile, and the next
        place to compile if the peak is as expected. The list has one place if no rung follows.

    Returns:
      The chosen place and all compiled peaks.
    """
    state = _Search(rungs=rungs, budget=budget, peaks=dict(known), is_answered=is_answered)
    for left in range(compiles, 0, -1):
        place = state.next_place(left)
        if place is None:
            break
        prepare([place, *state.likely_after(place, left)])
        state.peaks[place] = compile_peak(place)
    return Found(chosen=state.fitting, peaks=state.peaks)


@dataclasses.dataclass(kw_only=True)
class _Search:
    """The state of a search: compiled peaks so far, and the next rung to compile."""

    rungs: Sequence[Draft]
    budget: int
    peaks: dict[int, int]
    is_answered: bool

    @property
    def fitting(self) -> int | None:
        """The place of the fastest rung that is known to fit; None if no rung fits."""
        return min((i for i, peak in self.peaks.items() if peak <= self.budget), default=None)

    def next_place(self, left: int) -> int | None:
        """Returns the place to compile next; None if no compilation would change the answer."""
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
        # The rung before the answer is compiled as the proof that no faster rung fits.
        return high - 1 if high - 1 in unknown else None

    def likely_after(self, place: int, left: int) -> list[int]:
        """Returns a list of the next place to compile if the peak at `place` is as expected."""
        peaks = self.peaks | {place: round(self.expected(place))}
        after = dataclasses.replace(self, peaks=peaks).next_place(left - 1) if left > 1 else None
        return [] if after is None else [after]

    def is_safe(self, place: int) -> bool:
        """Returns whether a rung is not compiled yet and nearly sure to fit."""
        margin = _SAFE_MIXED if self.rungs[place].is_mixed else _SAFE
        return place not in self.peaks and self.expected(place) <= (1 - margin) * self.budget

    def corrected(self, place: int) -> float:
        """Returns the expected peak, reduced by `doubt` if no rung of its family is compiled.

        With too small a doubt, the search may pass over a plan that fits. With too large a doubt,
        the search spends one compilation, which corrects the whole family.
        """
        family = self.rungs[place].family
        is_known = any(self.rungs[i].family == family for i in self.peaks)
        return self.expected(place) * (1 if is_known else 1 - self.rungs[place].doubt)

    def expected(self, place: int) -> float:
        """Returns the predicted peak, corrected by the error of compiled rungs of its family."""
        rung = self.rungs[place]
        same = sorted(i for i in self.peaks if self.rungs[i].family == rung.family)
        errors = [self.peaks[i] / self.rungs[i].predicted_bytes for i in same]
        return rung.predicted_bytes * (float(np.interp(place, same, errors)) if same else 1.0)
