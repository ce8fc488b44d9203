"""Binomial checkpointing (REVOLVE): the fewest forwards with a given number of carries kept.

Griewank and Walther 2000, "Algorithm 799: Revolve", ACM TOMS 26(1): with s slots (the stack's input
takes one), and each block recomputed at most t times, at most C(s + t, s) blocks can be reversed.
The least number of extra forwards for L blocks is `t L - C(s + t, s + 1)` with the least t that
reaches L (their proposition 1). All blocks cost the same and all carries have the same size;
`optimal_chain` is for chains of different blocks.
"""

import math

from jaxckpt.schedules.actions import whole
from jaxckpt.schedules.recursive import unfold
from jaxckpt.schedules.schedule import Schedule


def binomial(num_blocks: int, slots: int) -> Schedule:
    """Returns an optimal schedule that holds one block's residuals and `slots` carries at a time.

    Every `Record` is of one block, and its `Reverse` follows at once. Slots beyond L - 1 stay
    empty.

    Args:
      num_blocks: The number of blocks, L.
      slots: The number of carries kept at once, with the stack's input, from 1 to L.

    Raises:
      TypeError: A number is not an integer.
      ValueError: There are no blocks, no slots, or more slots than blocks.

    Examples:
      >>> print(binomial(32, slots=4))
      binomial(slots=4): 32 blocks, 75 extra forwards, 4 slots
    """
    num_blocks, slots = _checked(num_blocks, slots)
    actions = unfold(num_blocks, _choose, room=slots)
    return Schedule(num_blocks, actions, f"binomial(slots={slots})")


def binomial_extra_forwards(num_blocks: int, slots: int) -> int:
    """Returns the extra forwards of `binomial(num_blocks, slots)` without making the schedule.

    Args:
      num_blocks: The number of blocks, L.
      slots: The number of carries kept at once, with the stack's input, from 1 to L.

    Raises:
      TypeError: A number is not an integer.
      ValueError: There are no blocks, no slots, or more slots than blocks.

    Examples:
      >>> binomial_extra_forwards(1000, slots=10)
      3636
    """
    num_blocks, slots = _checked(num_blocks, slots)
    repeats = _repeats(num_blocks, slots)
    return repeats * num_blocks - math.comb(slots + repeats, slots + 1)


def _checked(num_blocks: int, slots: int) -> tuple[int, int]:
    num_blocks = whole("num_blocks", num_blocks, least=1)
    return num_blocks, whole("slots", slots, least=1, most=num_blocks)


def _repeats(num_blocks: int, slots: int) -> int:
    """Returns the least t with C(slots + t, slots) >= num_blocks."""
    repeats, reach = 0, 1
    while reach < num_blocks:
        repeats += 1
        reach = reach * (slots + repeats) // repeats
    return repeats


def _choose(start: int, stop: int, slots: int) -> tuple[int, int]:
    """Returns an optimal split of a run of blocks, and the slots that its right part may use.

    The left part is reversed with all slots and one repeat less than the run, the right part with
    one slot less. Every split whose parts need no more repeats is optimal. The split of Algorithm
    799 (its subroutine `revolve`) also stores the fewest carries.
    """
    num_blocks = stop - start
    repeats = _repeats(num_blocks, slots)

    def comb(less: int, fewer_slots: int) -> int:
        of, pick = slots + repeats - less, slots - fewer_slots
        return math.comb(of, pick) if 0 <= pick <= of else 0

    if num_blocks <= comb(1, 0) + comb(3, 2):
        left = comb(2, 0)
    elif num_blocks >= comb(0, 0) - comb(3, 3):
        left = comb(1, 0)
    else:
        left = num_blocks - comb(2, 1) - comb(3, 2)
    return start + max(1, left), slots - 1
