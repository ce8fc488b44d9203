"""Flax Linen adapters: stacks, lists of modules and single modules under a plan.

    stack.py       Stack: L equal blocks, their parameters stacked in one tree
    lists.py       run: a list of modules that setup() made
    one_block.py   remat: a class whose call is checkpointed; remat_of: a context that checkpoints
                   each call of a class

The parameter tree does not depend on the plan: a checkpoint of one plan loads under any other.
"""

from jaxckpt.linen.lists import run
from jaxckpt.linen.one_block import remat, remat_of
from jaxckpt.linen.stack import Stack, in_dtype

__all__ = ["Stack", "in_dtype", "remat", "remat_of", "run"]
