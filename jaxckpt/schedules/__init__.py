"""`jaxckpt.schedules`: schedules of a stack's forward and backward pass, as one public module.

    schedule = jaxckpt.schedules.binomial(32, slots=4)
    print(schedule)    # binomial(slots=4): 32 blocks, 75 extra forwards, ..

A `Schedule` is data: the executor runs it, `simulate` replays it and counts.
"""

from jaxckpt.schedules.actions import Action, Advance, Free, Load, Record, Reverse, Store
from jaxckpt.schedules.binomial import binomial, binomial_extra_forwards
from jaxckpt.schedules.of_stage import under_loss
from jaxckpt.schedules.optimal_chain import BudgetTooSmall, optimal_chain
from jaxckpt.schedules.recursive import recursive
from jaxckpt.schedules.schedule import ChainCosts, Counts, IllegalSchedule, Schedule, simulate
from jaxckpt.schedules.segments import segment_sizes, uniform

__all__ = [
    "Action",
    "Advance",
    "BudgetTooSmall",
    "ChainCosts",
    "Counts",
    "Free",
    "IllegalSchedule",
    "Load",
    "Record",
    "Reverse",
    "Schedule",
    "Store",
    "binomial",
    "binomial_extra_forwards",
    "optimal_chain",
    "recursive",
    "segment_sizes",
    "simulate",
    "under_loss",
    "uniform",
]
