"""The schedule executor: any legal schedule over a stack, by flat loops with a custom gradient.

Nested `jax.checkpoint` cannot run an optimal schedule, and nested loops copy the weights and their
gradients at each level. Here a schedule is a table (`tables.make_table`):

- forward: one scan over the blocks writes the inputs that the schedule keeps into slots;
- backward: one scan over the table's rows. A row loads a slot, runs blocks forward and stores
  inputs again (its moves), then records and reverses its own blocks; gradients of the parameters
  are written in place into arrays of the parameters' shape.

The stacked parameters are indexed inside the loops, never copied; compile time does not depend on
the number of blocks. Reverse mode and forward mode over it are supported (`custom_gradient.py`);
`full` and the nested path support every transform.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt.plans import Stage, words
from jaxckpt.schedules.of_stage import stack_schedule_of
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms import stack_backward
from jaxckpt.transforms.block_vjp import Moving
from jaxckpt.transforms.custom_gradient import (
    batched_call,
    inexact,
    moved,
    run_with_gradient,
    widened,
)
from jaxckpt.transforms.policies import checkpoint_policy, refuse_bad_offload
from jaxckpt.transforms.stack_blocks import Blocks, How, Places
from jaxckpt.transforms.tables import make_table
from jaxckpt.transforms.traced_block import zeros


def runs(stage: Stage) -> bool:
    """Returns whether the executor runs a stage; `none` and `full` are plain loops."""
    return words.SCHEDULES[stage.schedule].makes is not None


def run_stage(
    call: Callable,
    params,
    carry,
    consts,
    stage: Stage,
    *,
    unroll: int,
    reverse: bool = False,
    places: Places | None = None,
) -> list:
    """Returns the output of a bound stage that the executor runs; see `run_schedule`."""
    policy = checkpoint_policy(stage.inner_policies)
    # Blocks are recorded in one loop and reversed in another, so XLA cannot merge the two and no
    # barrier is needed.
    checkpoint = functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    schedule = stack_schedule_of(stage)
    assert schedule is not None, stage
    how = How(
        offload=stage.offloads_carry,
        unroll=unroll,
        checkpoint=checkpoint if stage.inner_policies else None,
        reverse=reverse,
    )
    return run_schedule(call, params, carry, consts, schedule, how, places)


def run_schedule(
    call: Callable,
    params,
    carry,
    consts,
    schedule: Schedule,
    how: How,
    places: Places | None = None,
) -> list:
    """Runs a stack of blocks under a schedule.

    Args:
      call: `call(carry, params_i, consts) -> [*carry, *ys]`, all of them lists of leaves; it
        closes over nothing.
      params: Leaves `[L, ...]`.
      carry: The first block's input.
      consts: What all blocks share.
      schedule: For L blocks, already passed through `under_loss`; see `tables.make_table`.
      how: Where slots live, the unrolling, the wrapper of a recorded block, the direction.
      places: Where rows are, for blocks of several kinds.

    Returns:
      The leaves of the last block's carry, then those of the ys, `[L, ...]`.

    Raises:
      ValueError: The loops cannot follow the schedule.
    """
    if how.offload:
        refuse_bad_offload()
    args = (params, carry, consts)
    return run_with_gradient(Loops.of(call, make_table(schedule), how, args, places), *args)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Loops(Blocks):
    """The forward and the backward pass of one stack: a `Walk` of `custom_gradient.py`.

    Only the parameters and consts whose gradients the caller asks for are differentiated: `moving`.
    """

    def out_dim(self, place: int) -> int:
        """Returns the batch axis of an output: 0 for a carry; 1 for a y, whose axis 0 is blocks."""
        return int(place >= self.num_carry)

    def batched(self, args: Sequence, dims: Sequence, axis) -> tuple["Loops", Sequence]:
        """Returns the loops over `jax.vmap` of the block, whose leaves all have the batch first."""
        (params, carry, consts), (dims_params, dims_carry, dims_consts) = args, dims
        # Parameters have the blocks' axis before the batch. All carry leaves are batched, because
        # a block may mix them.
        params = [moved(x, dim, 1) for x, dim in zip(params, dims_params, strict=True)]
        carry = [widened(x, dim, axis) for x, dim in zip(carry, dims_carry, strict=True)]
        consts = [moved(x, dim, 0) for x, dim in zip(consts, dims_consts, strict=True)]
        first = lambda dims: [None if dim is None else 0 for dim in dims]
        in_axes = ([0] * len(carry), first(dims_params), first(dims_consts))
        batched = lambda call: batched_call(call, in_axes, axis)
        places = self.places
        if places is not None:
            places = dataclasses.replace(places, kinds=tuple(map(batched, places.kinds)))
        args = (params, carry, consts)
        return Loops.of(batched(self.call), self.table, self.how, args, places), args

    def run(self, params, carry, consts, length: int | None = None) -> list:
        """Returns the output of `length` blocks; by default of all blocks of the schedule."""
        if self.places is not None:
            emit = lambda i, state: self.emit(params, consts, state, i)
            carry, ys = lax.fori_loop(0, self.length, emit, (carry, self._empty_ys()))
            return [*carry, *ys]

        def body(carry, params_i):
            out = self.call(carry, params_i, consts)
            return out[: self.num_carry], out[self.num_carry :]

        carry, ys = lax.scan(body, carry, params, length or self.length, self.how.reverse)
        return [*carry, *ys]

    def forward(self, args, asked: Sequence[int]):
        """Returns the output, and the residuals for the backward pass."""
        params, carry, consts = args
        moving = Moving.of(asked, params, carry, consts)
        outputs = (*inexact(carry), *(len(carry) + place for place in inexact(self.ys)))
        moving = dataclasses.replace(moving, outputs=outputs)
        first = int(self.table.rows["record"][0]) if self.table.keeps_last else self.length

        state = (carry, self._empty_ys())
        sweep = self._sweep_to_host if self.how.offload else self._sweep_to_slots
        params, state, slots = sweep(params, consts, state, first)
        kept = []
        if self.table.keeps_last:
            recorder = self.recorder_of(moving)
            kept = recorder.empty(self.table.largest_row)
            blocks = (first, first, self.length, self.length - first)
            params, (state, kept) = self.record(recorder, params, consts, state, kept, *blocks)
        carry, ys = state
        return [*carry, *ys], (params, consts, slots, kept, moving)

    def _empty_ys(self) -> list:
        return [zeros(self.y_count(place), aval) for place, aval in enumerate(self.ys)]

    def _sweep_to_slots(self, params, consts, state, stop: int):
        """Runs blocks `0..stop` with one store in every trip.

        Returns:
          The parameters, as `loop` does, carry and ys, and the slots.
        """

        def body(state, step):
            (carry, ys), slots, handed = state
            index, slot = step
            if handed:
                index, handed = self.tied(index, handed)
            slots = self.store(slots, slot, carry)
            return (self.emit(handed or params, consts, (carry, ys), index), slots, handed), None

        steps = (jnp.arange(stop), jnp.asarray(self.table.sweep_slots[:stop]))
        unroll = min(self.how.unroll, max(stop, 1))
        state = (state, self.slots(state[0]), params if self.how.casts_rows else [])
        state, slots, handed = lax.scan(body, state, steps, length=stop, unroll=unroll)[0]
        return handed or params, state, slots

    def _sweep_to_host(self, params, consts, state, stop: int):
        """Like `_sweep_to_slots`, but a trip stores one carry and runs up to the next store.

        Only kept carries go over the link. Trips differ in their number of blocks, so that blocks
        are not unrolled.
        """
        stores = self.table.sweep_stores(stop)
        if not stores:
            return params, state, self.slots(state[0])

        def body(state, step):
            state, slots, handed = state
            start, stop_i, slot = step
            slots = self.store(slots, slot, state[0])
            emit = lambda i, params, state: (params, self.emit(params, consts, state, i))
            told = (stop, len(stores))
            made, state = self.loop(handed or params, start, stop_i, None, emit, state, told)
            return (state, slots, made if handed else []), None

        steps = tuple(jnp.asarray(column) for column in zip(*stores, strict=True))
        state = (state, self.slots(state[0]), params if self.how.casts_rows else [])
        state, slots, handed = lax.scan(body, state, steps, length=len(stores))[0]
        return handed or params, state, slots

    def backward(self, residuals, grads, num_steps=None) -> list:
        """Returns the gradients that are asked for; see `stack_backward.backward`."""
        return stack_backward.backward(self, residuals, grads, num_steps)
