"""`chain`: different blocks one after another, under any plan.

    y = jaxckpt.chain([embed, *blocks, head], x, remat="uniform:3")

A block is a function of the carry. The carry may change its shape from block to block. Arrays that
a block closes over, such as its parameters, get gradients too. Every block is traced and compiled
by itself, so that both times grow with the number of blocks.
"""

from collections.abc import Callable, Sequence

import jax
from jax.extend import core

from jaxckpt.plans import Plan, Policy
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms import chain_executor, observers, stack_executor, tags, value_names
from jaxckpt.transforms import checkpointed as reference
from jaxckpt.transforms.checks import check_policies, check_rerun, check_schedule
from jaxckpt.transforms.cuts import Opened
from jaxckpt.transforms.policies import GivenPolicy, all_of, plan_and_policy
from jaxckpt.transforms.traced_block import (
    TracedBlock,
    as_arrays,
    identity,
    once_compiled,
    trace_block,
)


def chain(
    blocks: Sequence[Callable],
    carry,
    *,
    remat: str | Plan | Schedule | Callable = "sqrt",
    nested: bool = False,
):
    """Runs different blocks one after another, checkpointed by a plan or a schedule.

    Args:
      blocks: Functions `carry -> carry`; shapes may change from block to block.
      carry: The first block's input, any pytree of arrays.
      remat: A plan or its text; or a schedule for `len(blocks)` blocks, such as the result of
        `schedules.optimal_chain` for a budget; or a policy of `jax.checkpoint`. A policy may name
        any value that at least one block has.
      nested: Runs a plan's schedules by nested `jax.checkpoint` instead of the executor. This
        recomputes more and keeps more, but supports forward mode and higher derivatives.

    Returns:
      The last block's output; differentiable in `carry` and in arrays that the blocks close over.

    Raises:
      PlanError: The plan does not parse, does not fit the blocks, or names what no block has.
      ValueError: There are no blocks, or the schedule is illegal or for another number of blocks.
      NotImplementedError: `auto`, `binomial` or a schedule with `nested`, or a second derivative
        through the executor.

    Example:
      >>> import jax, jax.numpy as jnp, jaxckpt
      >>> plan = jaxckpt.schedules.optimal_chain(
      ...     forward=[1, 1, 1], backward=[2, 2, 2],
      ...     carry_bytes=[4, 4, 4, 4], residual_bytes=[12, 12, 12], budget=20)
      >>> loss = lambda w: jaxckpt.chain([lambda x: jnp.sin(w * x)] * 3, 1.0, remat=plan)
      >>> plan.extra_forwards, float(jax.grad(loss)(0.0))
      (3, 0.0)
    """
    blocks = tuple(blocks)
    if not blocks:
        raise ValueError("a chain needs at least one block")
    if not all(map(callable, blocks)):
        raise ValueError(
            "a chain's blocks are functions carry -> carry; see scan_blocks for a stack"
        )
    remat, given = (remat, None) if isinstance(remat, Schedule) else plan_and_policy(remat)
    if isinstance(remat, Schedule):
        check_schedule(remat, len(blocks), nested)
        plan = remat
    else:
        plan = remat.bind(len(blocks))
    carry = as_arrays(carry)
    traced, consts, shape = [], [], carry
    for block in blocks:
        one, consts_i = trace_block(lambda carry, _, block=block: block(carry), shape)
        check_rerun(one, remat, given, nested)
        traced.append(one)
        consts.append(consts_i)
        shape = one.out
    if isinstance(remat, Plan):
        check_policies(remat, lambda asked: tags_of(traced, asked))
    if observers.is_observed():
        carry, consts = _told(traced, carry, consts, given or remat)
    identities = tuple(map(identity, blocks))
    program = once_compiled(_run, identities, tuple(traced), plan, given, nested)
    out = program(jax.tree.leaves(carry), consts)
    return jax.tree.unflatten(traced[-1].out_tree, out)


def _told(blocks: Sequence[TracedBlock], carry, consts: Sequence[list], remat):
    """Tells the observer about a chain; returns the chain's carry and consts, marked or not."""
    opened, ends = Opened.of_chain(blocks)
    leaves, tree = jax.tree.flatten((carry, list(consts)))
    block = TracedBlock(
        jaxpr=core.ClosedJaxpr(opened.jaxpr, ()),
        counts=(len(leaves), 0, 0),
        out_tree=blocks[-1].out_tree,
    )
    call = observers.StackCall(
        block=block,
        params=[],
        carry=leaves,
        remat=remat,
        num_blocks=len(blocks),
        unroll=1,
        is_region=True,
        ends=ends,
    )
    return jax.tree.unflatten(tree, observers.tell(call))


def _run(
    blocks: Sequence[TracedBlock],
    plan: Plan | Schedule,
    given: GivenPolicy | None,
    nested: bool,
    carry,
    consts,
) -> list:
    """Returns the leaves of the last block's output; takes lists of leaves."""
    calls = [block.call for block in blocks]
    if isinstance(plan, Schedule):
        return chain_executor.run_schedule(calls, carry, consts, plan)
    calls = [value_names.resolved(call, all_of(plan)) for call in calls]
    start = 0
    for stage in plan.stages:
        here = slice(start, start + stage.bound_count)
        if not nested and stack_executor.runs(stage):
            carry = chain_executor.run_stage(calls[here], carry, consts[here], stage)
        else:
            pairs = tuple(zip(calls[here], consts[here], strict=True))
            apply = lambda carry, pair: (pair[0](carry, [], pair[1]), None)
            listed = reference.Listed(blocks=pairs)
            carry, _ = reference.run_stage(listed, apply, carry, stage, given)
        start += stage.bound_count
    return carry


def tags_of(blocks: Sequence[TracedBlock], policies: Sequence[Policy]) -> tags.Tags:
    """Returns the tags that at least one of the blocks has."""
    found = [value_names.offered(block.call, policies, *block.inputs) for block in blocks]
    names = lambda kind: dict.fromkeys(name for tags in found for name in getattr(tags, kind))
    return tags.Tags(
        names=tuple(sorted(names("names"))),
        attention=any(one.attention for one in found),
        invented=tuple(names("invented")),
    )
