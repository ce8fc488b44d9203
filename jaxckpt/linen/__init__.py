"""Flax Linen adapters: a module class in, a rematerialized stack or class out; a list as it is.

    stack.py       Stack: L equal blocks, their parameters stacked in one tree
    lists.py       run: a list that setup() made, as it is
    one_block.py   remat: a class whose call is checkpointed; remat_of: a context that checkpoints
                   each call of a class

The parameter tree does not depend on the plan, so a checkpoint written under one plan loads under
any other.
"""

from jaxckpt.linen.lists import run
from jaxckpt.linen.one_block import remat, remat_of
from jaxckpt.linen.stack import Stack, in_dtype

__all__ = ["Stack", "in_dtype", "remat", "remat_of", "run"]
