"""`scan_blocks`: a stack of equal blocks under any plan.

    y = jaxckpt.scan_blocks(block, params, x, remat="sqrt")

`block(carry, params_i, *consts) -> carry` is pure; `params` stacks the parameters of L blocks on
the leading axis of every leaf. Anything that differs from block to block (a dropout key, a layer
index) travels in `params`; what all blocks share (a mask, positions) is a const.
"""

from collections.abc import Callable

import jax
from jax import lax

from jaxckpt.plans import Plan
from jaxckpt.schedules.of_stage import under_loss
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms import checkpointed as reference
from jaxckpt.transforms import observers, rows, stack_executor, value_names
from jaxckpt.transforms.checks import (
    check_carry,
    check_policies,
    check_rerun,
    check_schedule,
    check_stack,
    lists_explained,
    stack_length,
)
from jaxckpt.transforms.policies import GivenPolicy, all_of, plan_and_policy
from jaxckpt.transforms.traced_block import (
    TracedBlock,
    as_arrays,
    first_block,
    identity,
    once_compiled,
    trace_block,
)


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
      remat: A plan or its text, such as `"sqrt"` or `"8xfull/dots"`, or a schedule for L blocks
        that reverses at once what it records, such as `schedules.binomial(32, slots=4)`, or any
        policy of `jax.checkpoint`: then each block is under `jax.checkpoint` with it.
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
    check_stack(block, params)
    params, carry, consts = as_arrays((params, carry, consts))
    num_blocks = stack_length(params)
    remat, given = (remat, None) if isinstance(remat, Schedule) else plan_and_policy(remat)
    if isinstance(remat, Schedule):
        check_schedule(remat, num_blocks, nested)
        plan = remat
    elif num_blocks == 0 and remat.num_blocks is None:
        return carry
    else:
        plan = remat.bind(num_blocks)
    one = first_block(params)
    with lists_explained(params):
        traced, all_consts = trace_block(block, carry, one, consts)
    carry, is_cast = _as_returned(carry, traced.out)
    if is_cast:
        traced, all_consts = trace_block(block, carry, one, consts)
    check_carry(carry, traced.out)
    check_rerun(traced, remat, given)
    if isinstance(remat, Plan):
        check_policies(remat, lambda asked: value_names.offered(traced.call, asked, *traced.inputs))
    # What every block hands on is kept once and not with every carry.
    leaves, tree = jax.tree.flatten(carry)
    held = [leaf for place, leaf in enumerate(leaves) if place not in traced.changed]
    changed = [leaves[place] for place in traced.changed]
    alone = traced.only_changed()
    call = observers.StackCall(
        block=alone,
        params=params,
        carry=changed,
        remat=given or remat,
        num_blocks=num_blocks,
        unroll=unroll,
    )
    changed = observers.tell(call)
    static = (alone, plan, given, unroll, nested)
    program = once_compiled(_run, identity(block), *static)
    changed = iter(program(jax.tree.leaves(params), changed, [*all_consts, *held]))
    leaves = [next(changed) if n in traced.changed else x for n, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, leaves)


def _run(
    block: TracedBlock,
    plan: Plan | Schedule,
    given: GivenPolicy | None,
    unroll: int,
    nested: bool,
    params,
    carry,
    consts,
) -> list:
    """Returns the last block's carry; params, carry and consts are lists of leaves."""
    if isinstance(plan, Schedule):
        how = stack_executor.How(unroll=unroll)
        return stack_executor.run_schedule(block.call, params, carry, consts, under_loss(plan), how)
    call = value_names.resolved(block.call, all_of(plan))
    apply = lambda carry, params_i: call(carry, params_i, consts)
    start = 0
    # Where another stage keeps its rows, reading from the whole stack would keep that as well.
    reads_whole = rows.reads_inside(plan, unroll)
    for stage in plan.stages:
        part = _rows(params, start, start + stage.bound_count, plan.bound_count)
        if not nested and stack_executor.runs(stage):
            carry = stack_executor.run_stage(call, part, carry, consts, stage, unroll)
        else:
            blocks = reference.Stacked(
                params=part,
                length=stage.bound_count,
                unroll=unroll,
                part_of=(params, start) if reads_whole else None,
            )
            carry = reference.run_stage(blocks, apply, carry, stage, given)
        start += stage.bound_count
    return carry


def _as_returned(carry, made) -> tuple:
    """Returns the carry with Python scalars in the dtype that a block returns, and if any changed.

    As in `lax.scan`: a scalar has no dtype of its own.
    """
    leaves, tree = jax.tree.flatten(carry)
    if tree != jax.tree.structure(made):
        return carry, False
    pairs = zip(leaves, jax.tree.leaves(made), strict=True)
    is_free = lambda x, dtype: jax.typeof(x).weak_type and x.dtype != dtype
    cast = [x.astype(y.dtype) if is_free(x, y.dtype) else x for x, y in pairs]
    return jax.tree.unflatten(tree, cast), any(
        a is not b for a, b in zip(cast, leaves, strict=True)
    )


def _rows(params, start: int, stop: int, num_blocks: int):
    """Returns blocks `start..stop` of the stack; of the whole stack, no copy."""
    if (start, stop) == (0, num_blocks):
        return params
    return jax.tree.map(lambda x: lax.slice_in_dim(x, start, stop), params)
