"""Flax NNX adapters: stacks, lists of modules and single modules under a plan.

    stack.py       Stack: L equal blocks, their variables stacked in one block
    lists.py       run: a list of modules
    one_block.py   remat_of: a context that checkpoints each call of a class
    state.py       used by run and remat_of: modules to arrays and back

State does not depend on the plan.
"""

from jaxckpt.nnx.lists import run
from jaxckpt.nnx.one_block import remat_of
from jaxckpt.nnx.stack import Stack

__all__ = ["Stack", "remat_of", "run"]
