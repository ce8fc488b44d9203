"""A block's row of the stacked parameters, read where the block is run.

A loop reads each block's row as it comes to it. Unrolled, the rows are values of the program: XLA
finds that the backward pass reads the same ones and keeps every row of the forward pass until then,
a second copy of all parameters. `read_inside` moves the reading into the checkpointed block, behind
its barrier, so that a row is read when it is used, and again when the block is run again. So is
what the block makes of its row alone, such as a cast to bfloat16.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt.plans import Plan, as_plan
from jaxckpt.plans.actions import Schedule


def reads_inside(remat: str | Plan | Schedule, unroll: int) -> bool:
    """Returns whether every block of a stack is one that reads its own row."""
    if unroll == 1 or isinstance(remat, Schedule):
        return False
    return all(stage.schedule == "full" for stage in as_plan(remat).stages)


def read_inside(apply: Callable, items, whole, start: int):
    """Returns `apply` of `(params_i, index)`, which reads the floating rows, and the items for it.

    Args:
      apply: `(carry, params_i) -> carry`.
      items: The parameters of the blocks that are run; their gradients go to the rows, as ever.
      whole: Those of the stack that the blocks are a part of, so that no copy of a part is made.
      start: The place of the first of the blocks in it.
    """
    # The rows' values are not read, so they cost nothing: they are where the gradient goes.
    stacked = jax.tree.map(lax.stop_gradient, whole)

    def reading(carry, item):
        params_i, index = item
        return apply(carry, jax.tree.map(lambda x, x_i: _row(x, x_i, index), stacked, params_i))

    count = jax.typeof(jax.tree.leaves(items)[0]).shape[0]
    return reading, (items, jnp.arange(start, start + count))


def _row(stacked, row, index):
    return _read(stacked, row, index) if jnp.issubdtype(stacked.dtype, jnp.inexact) else row


@jax.custom_jvp
def _read(stacked, row, index):
    """Returns `stacked[index]`, whose derivative is that of `row`."""
    return lax.dynamic_index_in_dim(stacked, index, keepdims=False)


@_read.defjvp
def _read_jvp(primals, tangents):
    return _read(*primals), tangents[1]
