"""`scan_blocks`: a stack of equal blocks under any plan.

    y = jaxckpt.scan_blocks(block, params, x, remat="sqrt")

`block(carry, params_i, *consts) -> carry` is pure; `params` stacks the parameters of L blocks on
the leading axis of every leaf. Anything that differs from block to block (a dropout key, a layer
index) travels in `params`; what all blocks share (a mask, positions) is a const.
"""

from collections.abc import Callable

from jaxckpt.plans import Plan
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms.checks import check_stack, lists_explained, stack_length
from jaxckpt.transforms.scan import looped
from jaxckpt.transforms.traced_block import as_arrays, identity


def scan_blocks(
    block: Callable,
    params,
    carry,
    *consts,
    remat: str | Plan | Schedule | Callable = "sqrt",
    unroll: int = 1,
    nested: bool = False,
):
    """Runs a stack of L equal blocks, checkpointed by a plan.

    Args:
      block: `block(carry, params_i, *consts) -> carry`, pure; the carry keeps its structure,
        shapes and dtypes.
      params: A pytree whose leaves are `[L, ...]`.
      carry: The first block's input, any pytree of arrays.
      *consts: Handed to every block; they get gradients too.
      remat: A plan or its text, such as `"sqrt"` or `"8xfull/dots"`. Or a schedule for L blocks
        that reverses the blocks it records at once, such as `schedules.binomial(32, slots=4)`. Or
        a policy of `jax.checkpoint`, which then wraps each block.
      unroll: Blocks unrolled in one trip of a loop; 1 compiles fastest. Blocks that a schedule
        recomputes are never unrolled, nor is the forward pass if its carries go to the host.
      nested: Runs schedules by nested `jax.checkpoint` instead of the executor. This recomputes
        more and keeps more, but supports forward mode and higher derivatives.

    Returns:
      The last block's carry; differentiable in `params`, `carry` and `consts`.

    Raises:
      PlanError: The plan does not parse, does not fit L blocks, or names what no block has.
      ValueError: The leading sizes differ, the block changes its carry, `unroll` is no positive
        whole number, or the schedule is illegal, not for L blocks, or only for `jaxckpt.chain`.
      NotImplementedError: `auto`, `binomial` or a schedule with `nested`, or a second derivative
        through the executor.

    Example:
      >>> import jax, jax.numpy as jnp, jaxckpt
      >>> block = lambda x, w: jnp.tanh(x @ w)
      >>> w = jnp.zeros([12, 8, 8])
      >>> loss = lambda w: jaxckpt.scan_blocks(block, w, jnp.ones([4, 8]), remat="log").sum()
      >>> jax.grad(loss)(w).shape
      (12, 8, 8)
    """
    check_stack(block, params, consts)
    num_blocks = stack_length(as_arrays(params))

    def step(carry, params_i, *consts):
        with lists_explained(params):
            return block(carry, params_i, *consts), None

    options = {"remat": remat, "unroll": unroll, "nested": nested}
    return looped(step, carry, params, num_blocks, identity(block), *consts, **options)[0]
