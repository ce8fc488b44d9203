"""Uniform segments: the inputs of n runs of blocks are kept, each run recorded when its turn comes.

With carries of `a` bytes and residuals of `R` bytes a block the peak is about
`(n - 1) a + ceil(L / n) R + a`, which is least near `n = sqrt(L R / a)`, and one more forward of
the recomputed blocks is all it costs (Chen et al. 2016, "Training deep nets with sublinear memory
cost", section 4.1). It is not optimal at any budget; `optimal_chain` is.
"""

import itertools

from jaxckpt.plans.actions import (
    Action,
    Advance,
    Free,
    Load,
    Record,
    Reverse,
    Schedule,
    Store,
    whole,
)


def segment_sizes(num_blocks: int, segments: int) -> tuple[int, ...]:
    """Returns the sizes of `segments` runs of blocks: at most one apart, the larger ones last.

    The last segment is kept from the forward pass, so a larger last one recomputes less at the
    same peak.

    Raises:
      TypeError: A number that is not an integer.
      ValueError: No block, no segment, or more segments than blocks.
    """
    num_blocks = whole("num_blocks", num_blocks, least=1)
    segments = whole("segments", segments, least=1, most=num_blocks)
    small, larger = divmod(num_blocks, segments)
    return (small,) * (segments - larger) + (small + 1,) * larger


def uniform(num_blocks: int, segments: int, *, keep_last: bool = True) -> Schedule:
    """Returns the schedule with `segments` segments, each recorded once.

    Args:
      num_blocks: Number of blocks, L.
      segments: Number of segments, n, from 1 to L; sizes are those of `segment_sizes`.
      keep_last: Whether the last segment's residuals are kept from the forward pass: then
        L - k_n extra forwards (k_n the last size) and n - 1 slots, else L and n.

    Raises:
      TypeError: A number that is not an integer.
      ValueError: No block, no segment, or more segments than blocks.

    Examples:
      >>> print(uniform(28, segments=5))
      uniform(segments=5): 28 blocks, 22 extra forwards, 4 slots
    """
    sizes = segment_sizes(num_blocks, segments)
    ends = tuple(itertools.accumulate(sizes))
    bounds = tuple(zip((0, *ends[:-1]), ends, strict=True))
    stored = bounds[:-1] if keep_last else bounds
    actions: list[Action] = []
    for slot, (start, stop) in enumerate(stored):
        actions += [Store(slot), Advance(start, stop)]
    if keep_last:
        actions += _record_and_reverse(*bounds[-1])
    for slot, (start, stop) in reversed(tuple(enumerate(stored))):
        actions += [Load(slot), Free(slot), *_record_and_reverse(start, stop)]
    name = f"uniform(segments={segments}{'' if keep_last else ', keep_last=False'})"
    return Schedule(num_blocks, tuple(actions), name)


def _record_and_reverse(start: int, stop: int) -> list[Action]:
    return [Record(start, stop), *(Reverse(block) for block in range(stop - 1, start - 1, -1))]
