"""The schedule executor for different blocks: any legal schedule, action by action.

Blocks that differ cannot share a loop, so the actions of a schedule are unrolled into the program.
The actions before the first `Reverse` are the forward pass, the rest are the backward pass. Slots
and records at the end of the forward pass are the residuals. The whole chain has one custom
gradient; only first-order reverse mode is supported.

XLA merges equal computations, and a recomputed block equals its forward pass. Barriers that wait
for the gradient keep the two apart. XLA's CPU backend drops barriers before it merges (jax 0.10):
there a chain's gradients are right, but it saves less memory than its schedule says.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt.plans import Stage
from jaxckpt.schedules.actions import Action, Advance, Free, Load, Record, Reverse, Store
from jaxckpt.schedules.of_stage import schedule_of
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms.block_vjp import Moving, differentiate
from jaxckpt.transforms.custom_gradient import (
    batched_call,
    inexact,
    instantiated,
    moved,
    run_with_gradient,
    widened,
)
from jaxckpt.transforms.policies import checkpoint_policy, refuse_bad_offload


def run_stage(calls: Sequence[Callable], carry, consts, stage: Stage) -> list:
    """Returns the carry after a bound stage that the executor runs; see `run_schedule`."""
    kept = stage.inner_policies
    # The executor's barriers stand between blocks. Inside a block, `prevent_cse` keeps the values
    # that a policy recomputes apart from the values that the recording computed.
    wrap = functools.partial(jax.checkpoint, policy=checkpoint_policy(kept), prevent_cse=True)
    schedule = schedule_of(stage)
    assert schedule is not None, stage
    return run_schedule(
        calls,
        carry,
        consts,
        schedule,
        checkpoint=wrap if kept else None,
        offload=stage.offloads_carry,
    )


def run_schedule(
    calls: Sequence[Callable],
    carry,
    consts: Sequence[list],
    schedule: Schedule,
    *,
    checkpoint: Callable | None = None,
    offload: bool = False,
) -> list:
    """Runs different blocks under a schedule.

    Args:
      calls: L functions `call(carry, (), consts) -> carry` over lists of leaves.
      carry: The first block's input.
      consts: For each block, the leaves that it reads beside its carry.
      schedule: A legal schedule for L blocks.
      checkpoint: Wraps a block before it is recorded; None if it is recorded as it is.
      offload: Slots live in pinned host memory.

    Returns:
      The last block's carry.
    """
    if offload:
        refuse_bad_offload()
    walk = _Walk(
        calls=tuple(calls),
        actions=schedule.actions,
        checkpoint=checkpoint or (lambda call: call),
        offload=offload,
    )
    return run_with_gradient(walk, carry, list(consts))


@dataclasses.dataclass
class _Held:
    """What a walk over actions holds at one moment.

    Attributes:
      carry: The input of the next block to run.
      slots: The stored carries by slot.
      records: For each recorded block, its `reverse`: a pytree of its residuals.
      grad: The gradient of the output of the next block to reverse; None in the forward pass.
    """

    carry: list[Any]
    slots: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    records: dict[int, Any] = dataclasses.field(default_factory=dict)
    grad: list[Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Walk:
    """The forward and the backward pass of one chain; every array is an argument."""

    calls: tuple[Callable, ...]
    actions: tuple[Action, ...]
    checkpoint: Callable
    offload: bool

    @functools.cached_property
    def first_reverse(self) -> int:
        """Where the backward pass begins among the actions."""
        return next(n for n, action in enumerate(self.actions) if isinstance(action, Reverse))

    def out_dim(self, place: int) -> int:
        """Returns 0: every output has its batch axis first."""
        return 0

    def batched(self, args: Sequence, dims: Sequence, axis) -> tuple["_Walk", Sequence]:
        """Returns the walk over `jax.vmap` of every block, whose carry has the batch first."""
        (carry, consts), (dims_carry, dims_consts) = args, dims
        carry = [widened(x, dim, axis) for x, dim in zip(carry, dims_carry, strict=True)]
        made, calls = [], []
        for call, consts_i, dims_i in zip(self.calls, consts, dims_consts, strict=True):
            made.append([moved(x, dim, 0) for x, dim in zip(consts_i, dims_i, strict=True)])
            in_axes = (0, 0, [None if dim is None else 0 for dim in dims_i])
            calls.append(batched_call(call, in_axes, axis))
        return dataclasses.replace(self, calls=tuple(calls)), (carry, made)

    def run(self, carry, consts):
        """Returns the output."""
        for call, consts_i in zip(self.calls, consts, strict=True):
            carry = call(carry, [], consts_i)
        return carry

    def forward(self, args, asked: Sequence[int]):
        """Returns the output, and the residuals for the backward pass."""
        carry, consts = args
        moving, start = [], len(carry)
        for consts_i in consts:
            moving.append(Moving.of([place - start for place in asked], (), (), consts_i))
            start += len(consts_i)
        held, out = _Held(carry=carry), []
        for action in self.actions[: self.first_reverse]:
            self._run(action, held, consts, moving)
            if isinstance(action, Record) and action.stop == len(self.calls):
                out = held.carry
        of_carry = Moving.of(asked, (), carry, ())
        return out, (carry, consts, held.slots, held.records, moving, of_carry)

    def backward(self, residuals, grads) -> list:
        """Returns the gradients that are asked for, of the carry and of every block's consts."""
        carry, consts, slots, records, moving, of_carry = residuals
        held = _Held(carry=carry, slots=dict(slots), records=dict(records))
        grad = held.grad = instantiated(grads)
        of_consts: list[list] = [[] for _ in consts]
        for action in self.actions[self.first_reverse :]:
            if isinstance(action, Reverse):
                reverse = held.records.pop(action.block)
                grad, _, of_consts[action.block] = reverse(held.grad)
                held.grad = grad
            else:
                self._run(action, held, consts, moving)
        of_place: dict[int, Any] = dict(zip(inexact(carry), grad, strict=True))
        return [*(of_place[i] for i in of_carry.carry), *itertools.chain(*of_consts)]

    def _run(self, action: Action, held: _Held, consts, moving: Sequence[Moving]):
        """Runs any action but a `Reverse`."""
        match action:
            case Store(slot):
                held.slots[slot] = self._move(held.carry, jax.memory.Space.Host)
            case Load(slot):
                held.carry = self._move(held.slots[slot], jax.memory.Space.Device)
            case Free(slot):
                del held.slots[slot]
            case Advance(start, stop):
                for block in range(start, stop):
                    consts_i = _after_gradient(held, consts[block])
                    held.carry = self.calls[block](held.carry, [], consts_i)
            case Record(start, stop):
                for block in range(start, stop):
                    consts_i = _after_gradient(held, consts[block])
                    call = self.checkpoint(self.calls[block])
                    held.carry, held.records[block] = differentiate(
                        call, held.carry, [], consts_i, moving[block]
                    )

    def _move(self, carry, space):
        return [jax.device_put(x, space) for x in carry] if self.offload else carry


def _after_gradient(held: _Held, consts_i: list) -> list:
    """Makes a block of the backward pass wait for the gradient; returns its consts."""
    if held.grad is None:
        return consts_i
    held.carry, held.grad, made = _barrier((held.carry, held.grad, consts_i))
    # Under shard_map a barrier makes all its values varying; unvarying consts stay outside it.
    is_same = lambda x, y: jax.typeof(x) == jax.typeof(y)
    return [x if is_same(x, y) else y for x, y in zip(made, consts_i, strict=True)]


def _barrier(tree):
    """Returns the tree behind one optimization barrier, which takes key arrays as raw data."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    data = jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)
    wrap = lambda x, like: (
        jax.random.wrap_key_data(x, impl=jax.random.key_impl(like)) if is_key(like) else x
    )
    return jax.tree.map(wrap, lax.optimization_barrier(data), tree)
