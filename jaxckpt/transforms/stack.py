"""`scan_blocks`: a stack of equal blocks under any plan.

    y = jaxckpt.scan_blocks(block, params, x, remat="sqrt")

`block(carry, params_i, *consts) -> carry` is pure; `params` stacks the parameters of L blocks on
the leading axis of every leaf. Anything that differs from block to block (a dropout key, a layer
index) travels in `params`; what all blocks share (a mask, positions) is a const.
"""

from collections.abc import Callable

import jax
from jax import lax

from jaxckpt.plans import Plan, Stage, as_plan
from jaxckpt.plans.actions import Schedule
from jaxckpt.transforms import executor, invented, observers, rows, tags
from jaxckpt.transforms import nested as reference
from jaxckpt.transforms.blocks import (
    check_carry,
    check_policies,
    check_schedule,
    first_block,
    stack_length,
)
from jaxckpt.transforms.policies import all_of


def scan_blocks(
    block: Callable,
    params,
    carry,
    *consts,
    remat: str | Plan | Schedule = "sqrt",
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
      remat: A plan or its text, such as `"sqrt"` or `"8xfull/dots"`, or a schedule for L blocks
        that reverses at once what it records, such as `schedules.binomial(32, slots=4)`.
      unroll: Blocks unrolled in one trip of a loop; 1 compiles fastest. A schedule's re-runs have
        no fixed number of trips and are never unrolled, its forward pass is, but where the
        carries go to the host.
      nested: Runs schedules by nested `jax.checkpoint` instead of the executor. That recomputes
        more and keeps more, but has forward-mode and higher derivatives.

    Returns:
      The last block's carry; differentiable in `params`, `carry` and `consts`.

    Raises:
      PlanError: The plan does not parse, does not fit L blocks, or names what no block has.
      ValueError: Leading sizes that differ, a block that changes its carry, a bad `unroll`, or a
        schedule that is illegal, for another number of blocks, or only for `jaxckpt.chain`.
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
    if isinstance(unroll, bool) or not isinstance(unroll, int) or unroll < 1:
        raise ValueError(f"unroll is a whole number of blocks, at least 1, not {unroll!r}")
    num_blocks = stack_length(params)
    one = (tags.abstract(carry), first_block(params), *tags.abstract(consts))
    carry = observers.tell(
        block=block,
        params=params,
        carry=carry,
        consts=consts,
        remat=remat,
        num_blocks=num_blocks,
        unroll=unroll,
    )
    if isinstance(remat, Schedule):
        check_schedule(remat, num_blocks, nested)
        check_carry(block, *one)
        run = executor.Run(keep_last=executor.keeps_segments(remat), unroll=unroll)
        return executor.run_schedule(block, params, carry, consts, remat, run)
    given = as_plan(remat)
    plan = given.bind(num_blocks)
    check_carry(block, *one)
    check_policies(given, lambda asked: invented.offered(block, asked, *one))
    block = invented.resolved(block, all_of(given))
    start = 0
    # Where another stage keeps its rows, reading from the whole stack would keep that as well.
    reads_whole = rows.reads_inside(plan, unroll)
    for stage in plan.stages:
        part = _rows(params, start, start + stage.bound_count, num_blocks)
        if not nested and stage.schedule in executor.SCHEDULES:
            carry = executor.run_stage(block, part, carry, consts, stage, unroll)
        else:
            part_of = (params, start) if reads_whole else None
            blocks = reference.Stacked(
                params=part, length=stage.bound_count, unroll=unroll, part_of=part_of
            )
            carry = _run_scan(block, blocks, carry, consts, stage)
        start += stage.bound_count
    return carry


def _run_scan(block, blocks: reference.Stacked, carry, consts, stage: Stage):
    """Returns the carry after a stage without a schedule."""
    apply = lambda carry, params_i: block(carry, params_i, *consts)
    return reference.run_stage(blocks, apply, carry, stage)


def _rows(params, start: int, stop: int, num_blocks: int):
    """Returns blocks `start..stop` of the stack; of the whole stack, no copy."""
    if (start, stop) == (0, num_blocks):
        return params
    return jax.tree.map(lambda x: lax.slice_in_dim(x, start, stop), params)
