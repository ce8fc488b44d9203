"""Schedules of segments: uniform segments, and two levels of segments.

`uniform` keeps the inputs of n segments, runs of consecutive blocks, and records one at a time.
With carries of `a` bytes and residuals of `R` bytes per block, the peak is about `(n - 1) a +
ceil(L / n) R + a`, which is least near `n = sqrt(L R / a)`. It recomputes each block at most once
(Chen et al. 2016, "Training deep nets with sublinear memory cost", section 4.1). It is not optimal
under a budget; `optimal_chain` is.

`two_level` also keeps the block inputs of the live segment, so that only one block's residuals are
live. With about sqrt(L) segments of sqrt(L) blocks this is the O(sqrt L) method of section 4.1, for
blocks whose residuals are much larger than their inputs.
"""

import itertools
import math

from jaxckpt.schedules.actions import Action, Advance, Free, Load, Record, Reverse, Store, whole
from jaxckpt.schedules.schedule import Schedule


def segment_sizes(num_blocks: int, segments: int) -> tuple[int, ...]:
    """Returns the sizes of segments, which differ by at most one, larger sizes last.

    The residuals of the last segment are kept from the forward pass. A larger last segment means
    that fewer blocks are recomputed at the same peak.

    Args:
      num_blocks: The number of blocks, L.
      segments: The number of segments, from 1 to L.

    Raises:
      TypeError: A number is not an integer.
      ValueError: There are no blocks, no segments, or more segments than blocks.

    Examples:
      >>> segment_sizes(28, segments=5)
      (5, 5, 6, 6, 6)
    """
    num_blocks = whole("num_blocks", num_blocks, least=1)
    segments = whole("segments", segments, least=1, most=num_blocks)
    small, larger = divmod(num_blocks, segments)
    return (small,) * (segments - larger) + (small + 1,) * larger


def uniform(num_blocks: int, segments: int, *, keep_last: bool = True) -> Schedule:
    """Returns the schedule with `segments` segments, each recorded once.

    Args:
      num_blocks: The number of blocks, L.
      segments: The number of segments, n, from 1 to L; see `segment_sizes` for their sizes.
      keep_last: Whether the last segment's residuals are kept from the forward pass. With them
        there are L - k_n extra forwards (k_n is the last size) and n - 1 slots; otherwise there are
        L extra forwards and n slots.

    Raises:
      TypeError: A number is not an integer.
      ValueError: There are no blocks, no segments, or more segments than blocks.

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


def every(num_blocks: int, size: int) -> Schedule:
    """Returns the uniform schedule whose segments have at most `size` blocks.

    Args:
      num_blocks: The number of blocks, L.
      size: The largest number of blocks in a segment, at least 1.
    """
    return uniform(num_blocks, math.ceil(num_blocks / size))


def _record_and_reverse(start: int, stop: int) -> list[Action]:
    return [Record(start, stop), *(Reverse(block) for block in range(stop - 1, start - 1, -1))]


def two_level(num_blocks: int, segments: int | None = None) -> Schedule:
    """Returns the schedule that keeps each segment's input, then each block's input inside it.

    The last segment's block inputs are kept from the forward pass. With segments of sizes
    k_1..k_n, `extra_forwards` is 2L - n - k_n.

    Args:
      num_blocks: The number of blocks, L.
      segments: The number of segments, n; by default sqrt(L), rounded up.

    Raises:
      ValueError: A number is not positive, or there are more segments than blocks.
    """
    segments = math.isqrt(num_blocks - 1) + 1 if segments is None else segments
    sizes = segment_sizes(num_blocks, segments)
    starts = [sum(sizes[:index]) for index in range(segments)]
    actions: list[Action] = []
    for slot, (start, size) in enumerate(zip(starts[:-1], sizes[:-1], strict=True)):
        actions += [Store(slot=slot), Advance(start=start, stop=start + size)]
    # Slots 0..n-2 hold the segments' inputs, the next slots the last segment's block inputs.
    actions += _segment(starts[-1], num_blocks, segments - 1)
    for slot in reversed(range(segments - 1)):
        # The first block's input is the segment's input, which is in a slot already.
        actions += _segment(starts[slot], starts[slot] + sizes[slot], slot, stored=True)
    return Schedule(num_blocks=num_blocks, actions=tuple(actions))


def _segment(start: int, stop: int, slot: int, stored: bool = False) -> list[Action]:
    """Returns a pass over blocks `start..stop` that keeps their inputs, and their reversal.

    Args:
      start: The first block.
      stop: One past the last block.
      slot: The slot of the first block's input; the other inputs take the next slots.
      stored: Whether the first block's input is in its slot already and not yet loaded.
    """
    actions: list[Action] = [Load(slot=slot)] if stored else []
    for index in range(start, stop - 1):
        if index > start or not stored:
            actions.append(Store(slot=slot + index - start))
        actions.append(Advance(start=index, stop=index + 1))
    if stored and stop - start == 1:
        actions.append(Free(slot=slot))
    actions += [Record(start=stop - 1, stop=stop), Reverse(block=stop - 1)]
    for index in reversed(range(start, stop - 1)):
        kept = slot + index - start
        actions += [Load(slot=kept), Free(slot=kept)]
        actions += [Record(start=index, stop=index + 1), Reverse(block=index)]
    return actions
