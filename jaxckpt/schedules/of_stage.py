"""From a stage of a plan to the schedule that runs it.

REVOLVE's schedules assume that the loss is inside the last block. A stack's loss comes after it:
the last block is run to its end, its input is kept, and the backward pass recomputes the block.
`under_loss` makes this a part of the schedule, so that pictures, counts and plans show what runs.
"""

import dataclasses
import functools

from jaxckpt.plans import words
from jaxckpt.plans.plan import Stage
from jaxckpt.schedules.actions import Advance, Free, Load, Record, Store
from jaxckpt.schedules.binomial import binomial
from jaxckpt.schedules.schedule import Schedule

# `under_loss` adds one carry and one extra forward to a schedule that records one block at a time.
HANDED_OVER = 1


@functools.lru_cache(maxsize=64)  # a step is traced several times
def stack_schedule_of(stage: Stage) -> Schedule | None:
    """Returns the schedule that a stack runs in a bound stage; None for `none` and `full`."""
    schedule = schedule_of(stage)
    # `uniform` keeps its last segment from the forward pass, even if it has only one block.
    if schedule is None or words.SCHEDULES[stage.schedule].keeps_segments:
        return schedule
    return under_loss(schedule)


@functools.lru_cache(maxsize=64)
def under_loss(schedule: Schedule) -> Schedule:
    """Returns a schedule in the form for a stack whose loss comes after its last block.

    The forward pass runs the last block to its end and keeps its input in a slot: one carry and one
    extra forward more. A schedule is returned unchanged if its first record has several blocks
    (`uniform`), or if its first sweep already runs to the end and then loads a slot.

    Args:
      schedule: A legal schedule whose loss is inside its last block.

    Returns:
      A `Schedule` for the same blocks, whose name ends with `under a loss` if it was changed.

    Example:
      >>> from jaxckpt import schedules
      >>> schedule = schedules.binomial(32, slots=4)
      >>> schedule.extra_forwards, schedules.under_loss(schedule).extra_forwards
      (75, 76)
    """
    actions = schedule.actions
    place, first = next((n, one) for n, one in enumerate(actions) if isinstance(one, Load | Record))
    if isinstance(first, Load) or first.stop - first.start > 1:
        return schedule
    slots = {}  # slot in use -> the carry that it holds
    position = 0
    for action in actions[:place]:
        if isinstance(action, Store):
            slots[action.slot] = position
        elif isinstance(action, Advance):
            position = action.stop
        elif isinstance(action, Free):
            del slots[action.slot]
    held = [slot for slot, carry in slots.items() if carry == first.start]
    slot = held[0] if held else next(n for n in range(len(slots) + 1) if n not in slots)
    last = Advance(first.start, first.stop)
    handed = [last, Load(slot)] if held else [Store(slot), last, Load(slot), Free(slot)]
    return dataclasses.replace(
        schedule,
        actions=(*actions[:place], *handed, *actions[place:]),
        name=f"{schedule.name} under a loss",
    )


@functools.lru_cache(maxsize=64)
def schedule_of(stage: Stage) -> Schedule | None:
    """Returns the schedule of a bound stage; None for `none` and `full`, which are plain loops.

    Raises:
      ValueError: The stage has no count, or is `auto`.
    """
    if stage.count is None:
        raise ValueError(f"stage {str(stage)!r} is not bound to a number of blocks")
    if stage.schedule == "auto":
        raise ValueError("auto is no schedule before the planner has chosen one")
    makes = words.SCHEDULES[stage.schedule].makes
    if makes is None:
        return None
    numbers = (stage.count,) if stage.argument is None else (stage.count, stage.argument)
    return words.function_of(makes)(*numbers)


def log(num_blocks: int) -> Schedule:
    """Returns the schedule `log`: `binomial` with `log_slots` carries."""
    return binomial(num_blocks, log_slots(num_blocks))


def log_slots(num_blocks: int) -> int:
    """Returns the number of carries that `log` keeps: log2 L, rounded up, plus 1."""
    return (num_blocks - 1).bit_length() + 1
