"""From a stage of a plan to the schedule that runs it."""

import functools
import math

from jaxckpt.plans.binomial import binomial
from jaxckpt.plans.plan import Stage
from jaxckpt.plans.schedules import Schedule
from jaxckpt.plans.two_level import two_level
from jaxckpt.plans.uniform import uniform


@functools.lru_cache(maxsize=64)  # a step is traced several times
def schedule_of(stage: Stage) -> Schedule | None:
    """Returns the schedule of a bound stage, or None for `none` and `full`.

    Those two keep every carry in order and need no schedule: they are a plain loop over blocks.

    Raises:
      ValueError: A stage whose count is open, or `auto`.
    """
    if stage.count is None:
        raise ValueError(f"stage {str(stage)!r} is not bound to a number of blocks")
    if stage.schedule in ("none", "full"):
        return None
    return _SCHEDULES[stage.schedule](stage.count, stage.argument)


def log_slots(num_blocks: int) -> int:
    """Returns the carries that `log` keeps: one more than log2 L, rounded up."""
    return (num_blocks - 1).bit_length() + 1


def _log(num_blocks: int, _) -> Schedule:
    return binomial(num_blocks, log_slots(num_blocks))


def _every(num_blocks: int, size: int) -> Schedule:
    return uniform(num_blocks, math.ceil(num_blocks / size))


def _sqrt(num_blocks: int, _) -> Schedule:
    return two_level(num_blocks)


_SCHEDULES = {
    "uniform": uniform,
    "every": _every,
    "sqrt": _sqrt,
    "log": _log,
    "binomial": binomial,
}
