"""`scan`: a drop-in for `jax.lax.scan` under any plan.

    carry, ys = jaxckpt.scan(f, init, xs, remat="sqrt")

`f(carry, x) -> (carry, y)` is a step of a loop over time, or a block of a stack (`scan_blocks`). A
plan says which carries are kept; the backward pass recomputes from them. The ys are written once,
in the forward pass: a kept carry does not include ys, and a recomputed step does not compute them.
"""

from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt.plans import Plan
from jaxckpt.plans.errors import check_count, shown
from jaxckpt.schedules.of_stage import under_loss
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms import checkpointed as reference
from jaxckpt.transforms import observers, rows, stack_executor, stack_update, value_names
from jaxckpt.transforms.checks import (
    check_carry,
    check_pair,
    check_policies,
    check_rerun,
    check_schedule,
    steps_of,
)
from jaxckpt.transforms.policies import GivenPolicy, all_of, plan_and_policy
from jaxckpt.transforms.stack_blocks import How
from jaxckpt.transforms.traced_block import (
    TracedBlock,
    as_arrays,
    first_block,
    identity,
    once_compiled,
    trace_block,
)


def scan(
    f: Callable,
    init,
    xs=None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    *,
    remat: str | Plan | Schedule | Callable = "sqrt",
):
    """Runs a loop over the leading axis of `xs`, checkpointed by a plan.

    Args:
      f: `f(carry, x) -> (carry, y)`, pure; the carry keeps its structure, shapes and dtypes. Arrays
        that `f` closes over get gradients.
      init: The first carry, any pytree of arrays.
      xs: A pytree whose leaves are `[length, ...]`, of any dtypes; None if the steps read no x.
      length: The number of steps; needed if `xs` is None.
      reverse: Runs from the last x to the first, and writes the ys in the order of the xs.
      unroll: Steps unrolled in one trip of the forward loop. Recomputed steps are not unrolled.
      remat: A plan or its text, such as `"sqrt"`, `"binomial:16"` or `"uniform:8"`, a schedule for
        `length` steps, or a policy of `jax.checkpoint`.

    Returns:
      `(carry, ys)`: the last carry, and the stacked outputs, `[length, ...]`.

    Raises:
      PlanError: The plan does not parse, does not fit the steps, or names what no step has.
      ValueError: `f` does not return a pair or changes its carry, the length is unknown or differs
        from the leading size of `xs`, or `unroll` or the schedule is not valid.
      NotImplementedError: `auto`, or a second reverse mode through a schedule.

    Example:
      >>> import jax, jax.numpy as jnp, jaxckpt
      >>> step = lambda h, x: (jnp.tanh(h + x), h.sum())
      >>> loss = lambda xs: jaxckpt.scan(step, jnp.zeros(3), xs, remat="log")[1].sum()
      >>> jax.grad(loss)(jnp.ones([100, 3])).shape
      (100, 3)
    """
    if not callable(f):
        raise ValueError(f"the first argument of scan is f(carry, x) -> (carry, y), not {shown(f)}")
    num_steps = steps_of(xs, length)
    return looped(
        f, init, xs, num_steps, identity(f), remat=remat, unroll=unroll, reverse=bool(reverse)
    )


def looped(
    f: Callable,
    init,
    xs,
    num_steps: int,
    identities: Hashable,
    *consts,
    remat: str | Plan | Schedule | Callable,
    unroll: int = 1,
    reverse: bool = False,
    nested: bool = False,
):
    """Returns `(carry, ys)` as `scan` does; `scan`, `scan_blocks` and `run` all end here.

    Args:
      f: `f(carry, x, *consts) -> (carry, y)`.
      init: The first carry, any pytree of arrays.
      xs: A pytree whose leaves are `[num_steps, ...]`.
      num_steps: The number of steps, L.
      identities: What `identity` returns for the user's function.
      *consts: Handed to every step; they get gradients too.
      remat: A plan or its text, a schedule for L steps, or a policy of `jax.checkpoint`.
      unroll: Steps unrolled in one trip of the forward loop.
      reverse: Runs from the last x to the first.
      nested: Runs schedules by nested `jax.checkpoint` instead of the executor.
    """
    check_count("unroll", unroll, " of blocks")
    xs, carry, consts = as_arrays((xs, init, consts))
    remat, given = (remat, None) if isinstance(remat, Schedule) else plan_and_policy(remat)
    if isinstance(remat, Schedule):
        check_schedule(remat, num_steps, nested)
        plan = remat
    elif num_steps == 0 and remat.num_blocks is None:
        _, ys = lax.scan(lambda carry, x: f(carry, x, *consts), carry, xs, num_steps)
        return carry, ys
    else:
        plan = remat.bind(num_steps)
    one = first_block(xs)
    traced, all_consts = trace_block(f, carry, one, consts)
    check_pair(traced.out)
    carry, is_cast = as_returned(carry, traced.out[0])
    if is_cast:
        traced, all_consts = trace_block(f, carry, one, consts)
    made, y = traced.out
    check_carry(carry, made)
    check_rerun(traced, remat, given, nested)
    if isinstance(remat, Plan):
        check_policies(remat, lambda asked: value_names.offered(traced.call, asked, *traced.inputs))
    # Leaves that every block returns unchanged become consts: kept once, not with every carry.
    leaves, tree = jax.tree.flatten(carry)
    held = [leaf for place, leaf in enumerate(leaves) if place not in traced.changed]
    changed = [leaves[place] for place in traced.changed]
    alone = traced.only_changed()
    call = observers.StackCall(
        block=alone,
        params=xs,
        carry=changed,
        remat=given or remat,
        num_blocks=num_steps,
        unroll=unroll,
    )
    changed = observers.tell(call)
    updated = stack_update.taken(jax.tree.leaves(xs))
    if updated is not None:
        if nested:
            raise ValueError("update_in_backward runs schedules by the executor, not nested=True")
        call = alone.call
        if isinstance(plan, Plan):
            call = value_names.resolved(call, all_of(plan))
        groups = (jax.tree.leaves(xs), changed, [*all_consts, *held])
        out = stack_update.run(call, plan, given, *groups, updated, unroll=unroll, reverse=reverse)
        return _put_back(traced, leaves, tree, y, out)
    static = (alone, plan, given, unroll, reverse, nested)
    program = once_compiled(_run, identities, *static)
    out = program(jax.tree.leaves(xs), changed, [*all_consts, *held])
    return _put_back(traced, leaves, tree, y, out)


def _put_back(traced: TracedBlock, leaves: list, tree, y, out: list) -> tuple:
    """Returns the carry and the ys as pytrees.

    Args:
      traced: The traced block.
      leaves: All leaves of the first carry; the leaves that no block changes are returned.
      tree: The structure of the carry.
      y: One block's y.
      out: The changed leaves of the last carry, then the leaves of the ys.
    """
    made = iter(out)
    leaves = [next(made) if n in traced.changed else x for n, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, leaves), jax.tree.unflatten(jax.tree.structure(y), list(made))


def _run(
    block: TracedBlock,
    plan: Plan | Schedule,
    given: GivenPolicy | None,
    unroll: int,
    reverse: bool,
    nested: bool,
    params,
    carry,
    consts,
) -> list:
    """Returns the last carry, then the ys; everything is lists of leaves."""
    if isinstance(plan, Schedule):
        how = How(unroll=unroll, reverse=reverse)
        return stack_executor.run_schedule(block.call, params, carry, consts, under_loss(plan), how)
    call = value_names.resolved(block.call, all_of(plan))
    num_carry, made = len(carry), []

    def apply(carry, params_i):
        out = call(carry, params_i, consts)
        return out[:num_carry], out[num_carry:]

    start = 0
    # If another stage keeps its rows, reading from the whole stack would keep the stack as well.
    reads_whole = rows.reads_inside(plan, unroll)
    for stage in plan.stages:
        stop = start + stage.bound_count
        first, last = (
            (plan.bound_count - stop, plan.bound_count - start) if reverse else (start, stop)
        )
        part = _rows(params, first, last, plan.bound_count)
        if not nested and stack_executor.runs(stage):
            out = stack_executor.run_stage(
                call, part, carry, consts, stage, unroll=unroll, reverse=reverse
            )
            carry, ys = out[:num_carry], out[num_carry:]
        else:
            blocks = reference.Stacked(
                params=part,
                length=stage.bound_count,
                unroll=unroll,
                part_of=(params, first) if reads_whole else None,
                reverse=reverse,
            )
            carry, ys = reference.run_stage(blocks, apply, carry, stage, given)
        made.append(ys)
        start = stop
    in_order = made[::-1] if reverse else made
    return [*carry, *jax.tree.map(lambda *parts: jnp.concatenate(parts), *in_order)]


def as_returned(carry, made) -> tuple:
    """Returns the carry, its Python scalars cast to the dtypes of `made`, and whether any was cast.

    As in `lax.scan`: a Python scalar has no dtype of its own.
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
    """Returns rows `start..stop` of the stack; the stack itself, not a copy, if that is all."""
    if (start, stop) == (0, num_blocks):
        return params
    return jax.tree.map(lambda x: lax.slice_in_dim(x, start, stop), params)
