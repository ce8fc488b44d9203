"""Two-level schedules: segments, and inside the live one the block inputs are kept again.

With about sqrt(L) segments of sqrt(L) blocks this is the classic O(sqrt L) method (Chen et al.
2016, Training deep nets with sublinear memory cost, section 4.1) for blocks whose residuals are
much larger than their inputs: no more than one block's residuals are ever live.
"""

import math

from jaxckpt.plans.actions import Action, Advance, Free, Load, Record, Reverse, Schedule, Store
from jaxckpt.plans.uniform import segment_sizes


def two_level(num_blocks: int, segments: int | None = None) -> Schedule:
    """Returns the schedule that keeps each segment's input, then each block's input inside it.

    The last segment's block inputs are kept from the forward pass. With segments of sizes
    k_1..k_n, `extra_forwards` is 2L - n - k_n.

    Args:
      num_blocks: L.
      segments: n; the least whole number not below sqrt(L) by default.

    Raises:
      ValueError: Numbers that are not positive, or more segments than blocks.
    """
    segments = math.isqrt(num_blocks - 1) + 1 if segments is None else segments
    sizes = segment_sizes(num_blocks, segments)
    starts = [sum(sizes[:index]) for index in range(segments)]
    actions: list[Action] = []
    for slot, (start, size) in enumerate(zip(starts[:-1], sizes[:-1], strict=True)):
        actions += [Store(slot=slot), Advance(start=start, stop=start + size)]
    # Above the slots of the segments' inputs are those of the last segment's block inputs.
    actions += _segment(starts[-1], num_blocks, segments - 1)
    for slot in reversed(range(segments - 1)):
        # The first block's input is the segment's, which stays where it is.
        actions += _segment(starts[slot], starts[slot] + sizes[slot], slot, stored=True)
    return Schedule(num_blocks=num_blocks, actions=tuple(actions))


def _segment(start: int, stop: int, slot: int, stored: bool = False) -> list[Action]:
    """Returns a pass over blocks `start..stop` that keeps their inputs, and their reversal.

    Args:
      start: First block.
      stop: One past the last block.
      slot: Where the first block's input is kept; the others follow.
      stored: Whether it is there already and not yet loaded.
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
