"""The ladder: of all plans those worth compiling, from the fastest to the one with the least peak.

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
from collections.abc import Iterable, Sequence
from typing import Any

# Seconds closer than this are equal to the model.
_PRECISION = 0.002
# Rungs closer than this in peak are one: compiled peaks of such plans may be in either order.
_LEAST_STEP = 0.004


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """A plan on the ladder.

    Attributes:
      draft: The plan and the figures of its stacks: a `Draft`, or those of several stacks.
      predicted_bytes: The peak of the whole step.
      seconds: The whole step's, estimated.
    """

    draft: Any
    predicted_bytes: int
    seconds: float

    @property
    def is_mixed(self) -> bool:
        """Whether blocks are treated differently."""
        return len(self.draft.stages) > 1


def ladder(rungs: Iterable[Rung], plain: Sequence[Rung]) -> tuple[Rung, ...]:
    """Returns the rungs that no other beats, fastest first.

    Args:
      rungs: Candidates.
      plain: Fixed plans that a user would try first; they set the bounds on recomputation.
    """
    levels = sorted({rung.draft.flops for rung in plain})

    def rank(rung: Rung) -> tuple:
        above = sum(level < rung.draft.flops * (1 - 1e-9) for level in levels)
        speed = math.ceil(math.log(rung.seconds) / math.log1p(_PRECISION))
        plan = rung.draft
        held = plan.worst_bytes
        # What is equal in all of these stays in the order in which it was given.
        return above, speed, len(plan.stages), -held, rung.predicted_bytes

    ranked = sorted(rungs, key=rank)
    found = _thinned(_falling(ranked))
    # Of tens of thousands: told apart by identity, for comparing their values takes seconds.
    place = {id(rung): n for n, rung in enumerate(ranked)}
    ranked = ranked[: 1 + place[id(found[-1])]]
    alike = _thinned(_falling(rung for rung in ranked if not rung.is_mixed))
    kept = {id(rung): rung for rung in (*found, *alike)}.values()
    return tuple(sorted(kept, key=lambda rung: place[id(rung)]))


def _falling(rungs: Iterable[Rung]) -> list[Rung]:
    """Drops rungs that need no less than one before them."""
    kept: list[Rung] = []
    for rung in rungs:
        if not kept or rung.predicted_bytes < kept[-1].predicted_bytes:
            kept.append(rung)
    return kept


def _thinned(rungs: Sequence[Rung]) -> Sequence[Rung]:
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
