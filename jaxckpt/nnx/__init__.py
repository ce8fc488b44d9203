"""Flax NNX adapters: a module class in, a rematerialized stack out; or a list of modules as it is.

    stack.py       Stack: L equal blocks, their variables stacked in one block
    lists.py       run: a list of modules, as it is
    one_block.py   remat_of: a context that checkpoints each call of a class
    state.py       what run and remat_of have in common: modules as arrays, in and out

State does not depend on the plan.
"""

from jaxckpt.nnx.lists import run
from jaxckpt.nnx.one_block import remat_of
from jaxckpt.nnx.stack import Stack

__all__ = ["Stack", "remat_of", "run"]
