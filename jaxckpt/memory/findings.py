"""Remat that does nothing, found: each check returns one-line findings, each with its cure.

    for finding in findings_of_block(block, params_i, x, plan="dots_no_batch"):
        print(finding)

Checks of a block trace it and run nothing; checks of a step read what the caller has compiled. A
finding is a plan that works as written and does not do what it was written for; what cannot be
meant at all is a `PlanError` instead.
"""

from jaxckpt.memory.block_findings import (
    dots_that_save_nothing,
    findings_of_block,
    tags_that_save_nothing,
)
from jaxckpt.memory.finding import Finding
from jaxckpt.memory.peak_findings import head_sets_peak, peak_not_below_none
from jaxckpt.memory.step_findings import count_products, undone_remat

__all__ = [
    "Finding",
    "count_products",
    "dots_that_save_nothing",
    "findings_of_block",
    "head_sets_peak",
    "peak_not_below_none",
    "tags_that_save_nothing",
    "undone_remat",
]
