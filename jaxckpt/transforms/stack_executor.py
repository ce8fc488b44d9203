"""The schedule executor: any legal schedule over a stack, by flat loops under one own gradient.

Nested `jax.checkpoint` cannot run an optimal schedule, and nested loops copy weights and their
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
from jaxckpt.transforms import rows as slots_of
from jaxckpt.transforms.block_vjp import Moving, Recorder, differentiate
from jaxckpt.transforms.custom_gradient import (
    batched_call,
    inexact,
    moved,
    run_with_gradient,
    widened,
)
from jaxckpt.transforms.jaxprs import trips
from jaxckpt.transforms.policies import checkpoint_policy, refuse_bad_offload
from jaxckpt.transforms.rows import row_major
from jaxckpt.transforms.tables import Table, make_table
from jaxckpt.transforms.traced_block import abstract, first_block


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """How a schedule is run.

    Attributes:
      offload: Slots live in pinned host memory.
      unroll: Blocks unrolled in one trip of the forward pass; slots on the host are written once a
        trip of as many blocks as there are up to the next.
      checkpoint: How a block is wrapped before it is recorded, or None.
    """

    offload: bool = False
    unroll: int = 1
    checkpoint: Callable | None = None


def runs(stage: Stage) -> bool:
    """Returns whether the executor runs a stage; `none` and `full` are plain loops."""
    return words.SCHEDULES[stage.schedule].makes is not None


def run_stage(call: Callable, params, carry, consts, stage: Stage, unroll: int) -> list:
    """Returns the carry after a bound stage that the executor runs; see `run_schedule`."""
    policy = checkpoint_policy(stage.inner_policies)
    # A block is recorded in one loop and reversed in another, which keeps them apart.
    checkpoint = functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    schedule = stack_schedule_of(stage)
    assert schedule is not None, stage
    how = How(
        offload=stage.offloads_carry,
        unroll=unroll,
        checkpoint=checkpoint if stage.inner_policies else None,
    )
    return run_schedule(call, params, carry, consts, schedule, how)


def run_schedule(call: Callable, params, carry, consts, schedule: Schedule, how: How) -> list:
    """Runs a stack of blocks under a schedule.

    Args:
      call: `call(carry, params_i, consts) -> carry`, all of them lists of leaves; it closes over
        nothing.
      params: Leaves `[L, ...]`.
      carry: The first block's input.
      consts: What all blocks share.
      schedule: For L blocks, as it stands under a loss, executable (`tables.make_table`).
      how: How.

    Returns:
      The last block's carry.

    Raises:
      ValueError: A schedule that the loops cannot follow.
    """
    if how.offload:
        refuse_bad_offload()
    args = (params, carry, consts)
    return run_with_gradient(_Loops.of(call, make_table(schedule), how, args), *args)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Loops:
    """The forward and the backward pass of one stack; every array is an argument.

    Gradients are made only of the parameters and consts that the caller asks for: `moving`.
    """

    call: Callable
    table: Table
    how: How
    recorder_of: Callable[[Moving], Recorder]

    @classmethod
    def of(cls, call: Callable, table: Table, how: How, args: Sequence) -> "_Loops":
        """Returns the loops for arguments of the types of `args`."""
        params, carry, consts = args
        record = call if how.checkpoint is None else how.checkpoint(call)
        shapes = abstract((carry, first_block(params), consts))
        recorder_of = functools.cache(functools.partial(Recorder.trace, record, *shapes))
        return cls(call=call, table=table, how=how, recorder_of=recorder_of)

    @property
    def length(self) -> int:
        """L."""
        return len(self.table.sweep_slots)

    def batched(self, args: Sequence, dims: Sequence, axis) -> tuple["_Loops", Sequence]:
        """Returns the loops of `jax.vmap` of the block, which has the batch first everywhere."""
        params, carry, consts = args
        rest = iter(dims)
        dims_of = [[next(rest) for _ in leaves] for leaves in args]
        # A row is what comes behind the blocks' axis. Every carry has a batch once one has.
        params = [moved(x, dim, 1) for x, dim in zip(params, dims_of[0], strict=True)]
        carry = [widened(x, dim, axis) for x, dim in zip(carry, dims_of[1], strict=True)]
        consts = [moved(x, dim, 0) for x, dim in zip(consts, dims_of[2], strict=True)]
        first = lambda dims: [None if dim is None else 0 for dim in dims]
        in_axes = ([0] * len(carry), first(dims_of[0]), first(dims_of[2]))
        call = batched_call(self.call, in_axes, axis)
        args = (params, carry, consts)
        return _Loops.of(call, self.table, self.how, args), args

    def run(self, params, carry, consts) -> list:
        """Returns the output."""
        return self.sweep(params, carry, consts, 0, self.length)

    def sweep(self, params, carry, consts, start, stop):
        """Runs blocks `start..stop` and stores nothing."""
        body = lambda i, carry: self.call(carry, slots_of.row(params, i), consts)
        return lax.fori_loop(start, stop, body, carry)

    def forward(self, args, asked: Sequence[int]):
        """Returns the output, and what the backward pass is handed."""
        params, carry, consts = args
        moving = Moving.of(asked, params, carry, consts)
        recorder = self._recorder(moving)
        first = int(self.table.rows["record"][0]) if self.table.keeps_last else self.length

        sweep = self._sweep_to_host if self.how.offload else self._sweep_to_slots
        carry, slots = sweep(params, carry, consts, first)
        kept = [] if recorder is None else recorder.empty(self.table.largest_row)
        if self.table.keeps_last:
            blocks = (first, first, self.length)
            carry, kept = self._record(recorder, params, carry, consts, kept, *blocks)
        return carry, (params, consts, slots, kept, moving)

    def _sweep_to_slots(self, params, carry, consts, stop: int):
        """Runs blocks `0..stop`; returns the carry and the slots, every trip with one store."""

        def body(state, step):
            carry, slots = state
            index, slot = step
            slots = self._store(slots, slot, carry)
            return (self.call(carry, slots_of.row(params, index), consts), slots), None

        state = (carry, self._slots(carry))
        steps = (jnp.arange(stop), jnp.asarray(self.table.sweep_slots[:stop]))
        unroll = min(self.how.unroll, max(stop, 1))
        return lax.scan(body, state, steps, length=stop, unroll=unroll)[0]

    def _sweep_to_host(self, params, carry, consts, stop: int):
        """Does the same with one store a trip, of which each runs the blocks up to the next.

        Only what is kept goes over the link. The blocks of a trip have no fixed number, so that
        they are not unrolled.
        """
        stores = self.table.sweep_stores(stop)

        def body(state, step):
            carry, slots = state
            start, stop_i, slot = step
            slots = self._store(slots, slot, carry)
            with trips(stop, len(stores)):
                carry = self.sweep(params, carry, consts, start, stop_i)
            return (carry, slots), None

        state = (carry, self._slots(carry))
        steps = tuple(jnp.asarray(column) for column in zip(*stores, strict=True))
        return lax.scan(body, state, steps, length=len(stores))[0]

    def backward(self, residuals, grads) -> list:
        """Returns the gradients that are asked for, of parameters, carry and consts."""
        params, consts, slots, kept, moving = residuals
        state = (
            slots,
            kept,
            grads,
            [jnp.zeros_like(params[i]) for i in moving.params],
            [jnp.zeros_like(consts[i]) for i in moving.consts],
        )
        rows = {name: jnp.asarray(column) for name, column in self.table.rows.items()}
        # Blocks that the forward pass has recorded are not recorded again.
        rows["again"] = jnp.asarray(self.table.rows["record"])
        if self.table.keeps_last:
            rows["again"] = rows["again"].at[0].set(self.length)
        body = lambda state, row: (self._run_row(params, consts, moving, state, row), None)
        (_, _, grad_carry, grad_params, grad_consts), _ = lax.scan(body, state, rows)
        of_place = dict(zip(inexact(slots), grad_carry, strict=True))
        return [*grad_params, *(of_place[i] for i in moving.carry), *grad_consts]

    def _run_row(self, params, consts, moving, state, row):
        """Loads, moves, advances, records and reverses one row of the table."""
        slots, kept, *grads = state
        num_rows = len(self.table.rows["load"])
        moves = {name: jnp.asarray(column) for name, column in self.table.moves.items()}

        def move(index, state):
            carry, slots = state
            start, stop = moves["start"][index], moves["stop"][index]
            with trips(self.table.blocks_moved, self.table.num_moves):
                carry = self.sweep(params, carry, consts, start, stop)
            return carry, self._store(slots, moves["slot"][index], carry)

        carry = slots_of.load(slots, row["load"], on_host=self.how.offload)
        if self.table.num_moves:
            with trips(self.table.num_moves, num_rows):
                carry, slots = lax.fori_loop(
                    row["first_move"], row["last_move"], move, (carry, slots)
                )
        with trips(self.table.blocks_advanced, num_rows):
            carry = self.sweep(params, carry, consts, row["advance"], row["record"])
        recorder = self._recorder(moving)
        if recorder is None:
            params_i = slots_of.row(params, row["record"])
            _, reverse = differentiate(self.call, carry, params_i, consts, moving)
            grads = _accumulate(reverse, row["record"], *grads)
            return slots, kept, *grads
        again = int(self.table.rows["record"][0]) if self.table.keeps_last else self.length
        with trips(again, num_rows):
            blocks = (row["record"], row["again"], row["stop"])
            _, kept = self._record(recorder, params, carry, consts, kept, *blocks)

        def reverse_block(count, grads):
            index = row["stop"] - 1 - count
            residuals = row_major(slots_of.row(kept, index - row["record"]))
            reverse = recorder.reverse(residuals, slots_of.row(params, index), consts)
            return _accumulate(reverse, index, *grads)

        with trips(self.length, num_rows):
            grads = lax.fori_loop(0, row["stop"] - row["record"], reverse_block, tuple(grads))
        return slots, kept, *grads

    def _recorder(self, moving: Moving) -> Recorder | None:
        """Returns what records the blocks of a row; None where each row is a single block."""
        if self.table.keeps_last or self.table.largest_row > 1:
            return self.recorder_of(moving)
        return None

    @staticmethod
    def _record(recorder, params, carry, consts, kept, base, start, stop):
        """Records blocks `start..stop`; block i's residuals go to place `i - base` of `kept`."""

        def body(index, state):
            carry, kept = state
            carry, residuals = recorder.record(carry, slots_of.row(params, index), consts)
            return carry, slots_of.write(kept, index - base, row_major(residuals))

        return lax.fori_loop(start, stop, body, (carry, kept))

    def _slots(self, carry) -> list:
        return slots_of.empty(carry, self.table.num_slots, on_host=self.how.offload)

    def _store(self, slots, slot, carry) -> list:
        return slots_of.store(slots, slot, carry, on_host=self.how.offload)


def _accumulate(reverse: Callable, index, grad_carry, grad_params, grad_consts):
    """Reverses one block: its parameters' gradients are written, the consts' are added."""
    grad_carry, of_params, of_consts = reverse(grad_carry)
    grad_params = slots_of.write(grad_params, index, of_params)
    return grad_carry, grad_params, [a + b for a, b in zip(grad_consts, of_consts, strict=True)]
