"""A stack whose backward pass uses each block's gradient as soon as it is complete.

There is no array for the gradients of the stack. For an update in the backward pass, the reverse
loop of `stack_backward.py` carries parameters and optimizer state, and replaces the rows of a block
in them. For gradient accumulation, the loop carries sums of gradients, and adds to a block's rows.

The parameters and the rows of the state are arguments of the primitive, which returns their new
values in the place of their gradients. JAX differentiates everything outside the stack in its usual
way. Callers use `update_in_backward.py` and `accumulate.py`.

`attached` marks a stack's parameters while a loss is traced. `scan.looped` finds a marked array by
its identity.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from jaxckpt.plans import Plan, PlanError, Stage
from jaxckpt.schedules.of_stage import stack_schedule_of, under_loss
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.schedules.segments import uniform
from jaxckpt.transforms import stack_backward
from jaxckpt.transforms.block_vjp import Moving
from jaxckpt.transforms.custom_gradient import inexact, run_with_gradient
from jaxckpt.transforms.policies import GivenPolicy, checkpoint_policy, refuse_bad_offload
from jaxckpt.transforms.stack_blocks import How
from jaxckpt.transforms.stack_executor import Loops
from jaxckpt.transforms.tables import make_table

_REFUSAL = "a stack that is updated in its backward pass has one gradient; {} is refused"

# `update(grads, params, rows) -> (params, rows)` of one block; all are lists of leaves `[1, ...]`.
# If parameters are not replaced, both lists of parameters are empty.
UpdateBlock = Callable[[list, list, list], tuple[list, list]]


@dataclasses.dataclass(kw_only=True, eq=False)
class Attached:
    """A stack's parameters, which are updated where the stack runs.

    Attributes:
      marks: The arrays that stand for the stack's parameters in the loss.
      params: The parameters. If `replaces`, the new parameters are returned as their gradients.
      replaces: Whether parameters are replaced; otherwise only rows are replaced.
      rows: Arrays `[L, ...]`: leaves of the optimizer's state, or sums of gradients. The new rows
        are returned as their gradients.
      told: Float32 `[2]`. As its gradient are returned: the sum of squares of all gradients, and 1
        if all gradients were finite.
      update: The update of one block.
      skips: Whether no block is updated after the first gradient that is not finite.
      is_used: Whether a stack has run.
    """

    marks: list
    params: list
    replaces: bool = True
    rows: list
    told: jax.Array
    update: UpdateBlock
    skips: bool
    is_used: bool = False


_ATTACHED: contextvars.ContextVar[Attached | None] = contextvars.ContextVar(
    "jaxckpt_attached", default=None
)


@contextlib.contextmanager
def attached(one: Attached) -> Iterator[None]:
    """A context in which the stack of the marked parameters updates them."""
    token = _ATTACHED.set(one)
    try:
        yield
    finally:
        _ATTACHED.reset(token)


def is_attached(tree) -> bool:
    """Returns whether a tree has marked parameters."""
    one = _ATTACHED.get()
    return one is not None and bool(_found(one, jax.tree.leaves(tree)))


def _found(one: Attached, leaves: Sequence) -> dict[int, int]:
    """Returns, for the place of each marked leaf, the place of its mark among the marks."""
    marks = {id(mark): place for place, mark in enumerate(one.marks)}
    return {n: marks[id(leaf)] for n, leaf in enumerate(leaves) if id(leaf) in marks}


def taken(leaves: Sequence) -> tuple[Attached, dict[int, int]] | None:
    """Returns the `Attached` of a stack's parameters, and their marks; None if no leaf is marked.

    Returns:
      The `Attached`, and a dict from the place of a marked leaf to the place of its mark.

    Raises:
      ValueError: The stack does not have all marked parameters, or a stack with them ran before.
    """
    one = _ATTACHED.get()
    found = {} if one is None else _found(one, leaves)
    if one is None or not found:
        return None
    if one.is_used:
        raise ValueError(
            "update_in_backward: the blocks run twice in the loss, so no block's gradient is whole "
            "when its first reversal is done"
        )
    if len(set(found.values())) < len(one.marks):
        raise ValueError(
            f"update_in_backward: a stack takes {len(found)} of the {len(one.marks)} arrays that "
            "blocks= returns; it has to be given all of them, and as they are"
        )
    one.is_used = True
    return one, found


def run(
    call: Callable,
    plan: Plan | Schedule,
    given: GivenPolicy | None,
    params: list,
    carry: list,
    consts: list,
    of: tuple[Attached, dict[int, int]],
    *,
    unroll: int,
    reverse: bool,
) -> list:
    """Returns the last carry and the ys of a stack that updates its blocks; see `scan.looped`.

    Args:
      call: `call(carry, params_i, consts) -> [*carry, *ys]`, all of them lists of leaves.
      plan: Bound to L blocks, or a schedule for L blocks.
      given: The user's own policy, for a plan that is `full`.
      params: Leaves `[L, ...]`.
      carry: The first block's input.
      consts: What all blocks share.
      of: What `taken` returned.
      unroll: Blocks unrolled in one trip of the forward pass.
      reverse: Whether the block of the last row runs first.
    """
    one, places = of
    params = [one.params[places[n]] if n in places else x for n, x in enumerate(params)]
    args = (params, carry, consts)
    stages, start = [], 0
    parts = _parts(plan, given)
    count = sum(schedule.num_blocks for schedule, _ in parts)
    for schedule, how in parts:
        stop = start + schedule.num_blocks
        if how.offload:
            refuse_bad_offload()
        first_row = count - stop if reverse else start
        how = dataclasses.replace(
            how, unroll=unroll, reverse=reverse, first_row=first_row, casts_rows=one.replaces
        )
        stages.append(Loops.of(call, make_table(schedule), how, args))
        start = stop
    update = _Update(places=places, replaces=one.replaces, update=one.update, skips=one.skips)
    walk = _Updating(stages=tuple(stages), update=update)
    return run_with_gradient(walk, *args, one.rows, one.told, refusal=_REFUSAL)


def _parts(plan: Plan | Schedule, given: GivenPolicy | None) -> list[tuple[Schedule, How]]:
    """Returns the schedule of each stage, also of `none` and `full`, and how it is run."""
    if isinstance(plan, Schedule):
        return [(under_loss(plan), How())]
    return [_part(stage, given) for stage in plan.stages]


def _part(stage: Stage, given: GivenPolicy | None) -> tuple[Schedule, How]:
    policy = given or (checkpoint_policy(stage.inner_policies) if stage.inner_policies else None)
    checkpoint = None
    if policy is not None:
        checkpoint = functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    schedule = stack_schedule_of(stage)
    if schedule is None and stage.schedule == "full" and policy is None:
        # Every block's input is kept, every block recorded once.
        schedule = under_loss(uniform(stage.bound_count, stage.bound_count))
    elif schedule is None:
        if stage.offloads_carry:
            raise PlanError(
                f"{stage}: with update_in_backward offload:carry stands alone, without policies"
            )
        # All blocks are recorded in the forward pass, with all residuals or those of the policies.
        schedule = uniform(stage.bound_count, 1)
    return schedule, How(offload=stage.offloads_carry, checkpoint=checkpoint)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Update:
    """A `stack_backward.Update`: turns a block's gradients into new rows of parameters and state.

    `made` has four parts: the parameters; the rows of the state; the sum of squares and whether all
    gradients were finite; gradients of the parameters that are not updated.

    Attributes:
      places: From the place of an updated parameter to its place among the optimizer's parameters.
      replaces: Whether parameters are replaced; otherwise only rows of the state are replaced.
      update: The update of one block.
      skips: Whether no block is updated after the first gradient that is not finite.
      moving: The places of the parameters that have gradients.
    """

    places: dict[int, int]
    replaces: bool
    update: UpdateBlock
    skips: bool
    moving: tuple[int, ...] = ()

    def params(self, given: list, made) -> list:
        """Returns the current parameters."""
        return made[0] if self.replaces else given

    def with_params(self, made, params: list):
        """Returns `made` with the parameters that a loop returned."""
        return (params, *made[1:]) if self.replaces else made

    def write(self, made, place, grads: list):
        """Updates one block."""
        params, rows, (squares, is_finite), others = made
        of_leaf = dict(zip(self.moving, grads, strict=True))
        rest = [n for n in self.moving if n not in self.places]
        put = lambda x, row: lax.dynamic_update_slice_in_dim(x, row, place, 0)
        read = lambda x: lax.dynamic_slice_in_dim(x, place, 1, 0)
        others = [put(x, of_leaf[n][None]) for n, x in zip(rest, others, strict=True)]
        # In the order in which the optimizer has them.
        order = sorted(self.places, key=self.places.__getitem__)
        grads = [of_leaf[n][None] for n in order]
        of_block = sum(jnp.square(g.astype(jnp.float32)).sum() for g in grads)
        is_finite &= jnp.isfinite(of_block)
        order = order if self.replaces else []
        old = ([read(params[n]) for n in order], list(map(read, rows)))
        new = self.update(grads, *old)
        if self.skips:
            new = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), tuple(new), old)
        of_params = dict(zip(order, new[0], strict=True))
        params = [put(x, of_params[n]) if n in of_params else x for n, x in enumerate(params)]
        rows = [put(x, row) for x, row in zip(rows, new[1], strict=True)]
        return params, rows, (squares + of_block, is_finite), others


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Updating:
    """The forward and the backward pass of a stack's stages; a `Walk` of `custom_gradient.py`.

    Its arguments are parameters, carry, consts, the state's rows and `told`.

    Attributes:
      stages: The loops of each stage, which read the rows of the whole stack.
      update: The use of a block's gradients.
    """

    stages: tuple[Loops, ...]
    update: _Update

    def out_dim(self, place: int) -> int:
        """Returns the batch axis of an output; never called, because `batched` raises."""
        return place

    def batched(self, args, dims, axis):
        """Raises: a batch of losses has no one update."""
        raise NotImplementedError("update_in_backward is outside of jax.vmap, not inside of it")

    def run(self, params, carry, consts, rows, told) -> list:
        """Returns the output."""
        del rows, told
        count = sum(stage.length for stage in self.stages)
        return self.stages[0].run(params, carry, consts, count)

    def forward(self, args, asked: Sequence[int]):
        """Returns the output, and the residuals for the backward pass."""
        params, carry, consts, rows, _ = args
        moving = Moving.of(asked, params, carry, consts)
        # Parameters come first, so that their places are their positions.
        asked = sorted({*asked, *self.update.places})
        num_carry: int = self.stages[0].num_carry
        made, kept = [], []
        for stage in self.stages:
            out, residuals = stage.forward((params, carry, consts), asked)
            carry, ys = out[:num_carry], out[num_carry:]
            made.append(ys)
            params, *_ = residuals
            kept.append(residuals[2:])
        made = made[::-1] if self.stages[0].how.reverse else made
        ys = jax.tree.map(lambda *parts: jnp.concatenate(parts), *made)
        return [*carry, *ys], (params, consts, rows, kept, moving)

    def backward(self, residuals, grads) -> list:
        """Returns new parameters, gradients, new rows of the state, and the gradient of `told`."""
        params, consts, rows, kept, moving = residuals
        places = inexact(kept[0][0])
        grad_carry, of_ys = grads[: len(places)], grads[len(places) :]
        finite = jnp.bool_(True)
        for grad in grad_carry:
            if not isinstance(grad, ad.Zero):
                finite &= jnp.isfinite(grad).all()
        update = dataclasses.replace(self.update, moving=kept[0][2].params)
        others = [jnp.zeros_like(params[n]) for n in moving.params if n not in update.places]
        made = (params if update.replaces else [], rows, (jnp.float32(0), finite), others)
        state = (made, [jnp.zeros_like(consts[n]) for n in moving.consts])
        for stage, (slots, held, of_stage) in reversed(list(zip(self.stages, kept, strict=True))):
            first = stage.how.first_row
            cut = lambda g, first=first, stop=first + stage.length: (
                g if isinstance(g, ad.Zero) else lax.slice_in_dim(g, first, stop)
            )
            given = (params, consts, slots, held, of_stage)
            all_grads = [*grad_carry, *map(cut, of_ys)]
            grad_carry, state = stack_backward.reversed_stage(
                stage, given, all_grads, state, update=update
            )
        (new, rows, (squares, finite), others), of_consts = state
        left = iter(others)
        of_params = [new[n] if n in update.places else next(left) for n in moving.params]
        of_place = dict(zip(places, grad_carry, strict=True))
        of_carry = [of_place[n] for n in moving.carry]
        told = jnp.stack([squares, finite.astype(jnp.float32)])
        return [*of_params, *of_carry, *of_consts, *rows, told]
