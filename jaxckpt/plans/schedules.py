"""Schedules of a stack's forward and backward pass, by name: users reach this as one module.

    schedule = jaxckpt.schedules.binomial(32, slots=4)
    print(schedule)    # binomial(slots=4): 32 blocks, 75 extra forwards, ..

A `Schedule` is data; the executor runs it, `simulate` replays it on paper.
"""

from jaxckpt.plans.actions import (
    Action,
    Advance,
    ChainCosts,
    Free,
    Load,
    Record,
    Reverse,
    Schedule,
    Store,
)
from jaxckpt.plans.binomial import binomial, binomial_extra_forwards
from jaxckpt.plans.optimal_chain import BudgetTooSmall, optimal_chain
from jaxckpt.plans.recursive import recursive
from jaxckpt.plans.simulate import Counts, IllegalSchedule, simulate
from jaxckpt.plans.stage_schedule import under_loss
from jaxckpt.plans.uniform import segment_sizes, uniform

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
