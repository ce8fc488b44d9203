"""From a stage of a plan to the schedule that runs it.

REVOLVE's schedules speak as if the loss sat inside the last block. A stack stands before its loss:
its last block is run to the end, and its input waits for the backward pass, which runs the block
once more. `under_loss` makes this a part of the schedule, so that what is drawn, counted and
planned is what runs.
"""

import dataclasses
import functools

from jaxckpt.plans import words
from jaxckpt.plans.plan import Stage
from jaxckpt.schedules.actions import Advance, Free, Load, Record, Store
from jaxckpt.schedules.binomial import binomial
from jaxckpt.schedules.schedule import Schedule

# What `under_loss` adds to a schedule that records one block at a time: a carry, a block forward.
HANDED_OVER = 1


@functools.lru_cache(maxsize=64)  # a step is traced several times
def stack_schedule_of(stage: Stage) -> Schedule | None:
    """Returns the schedule that a stack runs in a bound stage, or None for `none` and `full`."""
    schedule = schedule_of(stage)
    # The last segment of `uniform` is kept from the forward pass, however short it is.
    if schedule is None or words.SCHEDULES[stage.schedule].keeps_segments:
        return schedule
    return under_loss(schedule)


@functools.lru_cache(maxsize=64)
def under_loss(schedule: Schedule) -> Schedule:
    """Returns a schedule as a stack runs it, whose loss comes after its last block.

    The last block is run to the end, and its input is handed over in a slot: one more carry, and
    one more block forward. A schedule that records several blocks first (`uniform`) keeps them, and
    one that comes back by a load runs to the end anyway: both are returned as they are.

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
    slots = {}  # those in use, by the carry that they hold
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
    """Returns the schedule of a bound stage, or None for `none` and `full`.

    Those two keep every carry in order and need no schedule: they are a plain loop over blocks.

    Raises:
      ValueError: A stage whose count is open, or `auto`.
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
    """Returns the binomial schedule with as many carries as `log` keeps."""
    return binomial(num_blocks, log_slots(num_blocks))


def log_slots(num_blocks: int) -> int:
    """Returns the carries that `log` keeps: one more than log2 L, rounded up."""
    return (num_blocks - 1).bit_length() + 1
