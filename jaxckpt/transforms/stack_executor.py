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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from jaxckpt.plans import Stage, words
from jaxckpt.schedules.of_stage import stack_schedule_of
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms import rows as slots_of
from jaxckpt.transforms.block_vjp import Moving, Recorder, differentiate
from jaxckpt.transforms.custom_gradient import (
    batched_call,
    inexact,
    instantiated,
    moved,
    pick,
    run_with_gradient,
    widened,
)
from jaxckpt.transforms.jaxprs import trips
from jaxckpt.transforms.policies import checkpoint_policy, refuse_bad_offload
from jaxckpt.transforms.rows import row_major
from jaxckpt.transforms.tables import BLOCKS, Counts, Loop, Table, make_table
from jaxckpt.transforms.traced_block import abstract, first_block, zeros

# Carries up to this size are stored after every block of a move: that takes less time than a GPU's
# host takes to read when a loop of its own would end.
_SMALL_CARRY = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """How a schedule is run.

    Attributes:
      offload: Slots live in pinned host memory.
      unroll: Blocks unrolled in one trip of the forward pass; slots on the host are written once a
        trip of as many blocks as there are up to the next.
      checkpoint: How a block is wrapped before it is recorded, or None.
      reverse: The first block reads the last row, as in `lax.scan(..., reverse=True)`.
    """

    offload: bool = False
    unroll: int = 1
    checkpoint: Callable | None = None
    reverse: bool = False


def runs(stage: Stage) -> bool:
    """Returns whether the executor runs a stage; `none` and `full` are plain loops."""
    return words.SCHEDULES[stage.schedule].makes is not None


def run_stage(
    call: Callable, params, carry, consts, stage: Stage, *, unroll: int, reverse: bool
) -> list:
    """Returns the output of a bound stage that the executor runs; see `run_schedule`."""
    policy = checkpoint_policy(stage.inner_policies)
    # A block is recorded in one loop and reversed in another, which keeps them apart.
    checkpoint = functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    schedule = stack_schedule_of(stage)
    assert schedule is not None, stage
    how = How(
        offload=stage.offloads_carry,
        unroll=unroll,
        checkpoint=checkpoint if stage.inner_policies else None,
        reverse=reverse,
    )
    return run_schedule(call, params, carry, consts, schedule, how)


def run_schedule(call: Callable, params, carry, consts, schedule: Schedule, how: How) -> list:
    """Runs a stack of blocks under a schedule.

    Args:
      call: `call(carry, params_i, consts) -> [*carry, *ys]`, all of them lists of leaves; it
        closes over nothing.
      params: Leaves `[L, ...]`.
      carry: The first block's input.
      consts: What all blocks share.
      schedule: For L blocks, as it stands under a loss, executable (`tables.make_table`).
      how: How.

    Returns:
      The leaves of the last block's carry, then those of the ys, `[L, ...]`.

    Raises:
      ValueError: A schedule that the loops cannot follow.
    """
    if how.offload:
        refuse_bad_offload()
    args = (params, carry, consts)
    return run_with_gradient(Loops.of(call, make_table(schedule), how, args), *args)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Loops:
    """The forward and the backward pass of one stack; every array is an argument.

    Gradients are made only of the parameters and consts that the caller asks for: `moving`.

    Attributes:
      call: As for `run_schedule`.
      table: What the loops read.
      how: How.
      ys: The types of what a block returns beside its carry.
      num_carry: Leaves of the carry.
      moves_by_block: Moves are run block by block, by one loop that stores every carry.
      recorder_of: Traces what records a block.
    """

    call: Callable
    table: Table
    how: How
    ys: list
    num_carry: int
    moves_by_block: bool
    recorder_of: Callable[[Moving], Recorder]

    @classmethod
    def of(cls, call: Callable, table: Table, how: How, args: Sequence) -> "Loops":
        """Returns the loops for arguments of the types of `args`."""
        params, carry, consts = args
        record = call if how.checkpoint is None else how.checkpoint(call)
        shapes = abstract((carry, first_block(params), consts))
        carry_bytes = sum(x.size * x.dtype.itemsize for x in shapes[0])
        return cls(
            call=call,
            table=table,
            how=how,
            ys=jax.make_jaxpr(call)(*shapes).out_avals[len(carry) :],
            num_carry=len(carry),
            moves_by_block=not how.offload and carry_bytes <= _SMALL_CARRY,
            recorder_of=functools.cache(functools.partial(Recorder.trace, record, *shapes)),
        )

    @property
    def length(self) -> int:
        """L."""
        return len(self.table.sweep_slots)

    def out_dim(self, place: int) -> int:
        """Returns where an output of a batch has it: behind the blocks' axis, if there is one."""
        return int(place >= self.num_carry)

    def batched(self, args: Sequence, dims: Sequence, axis) -> tuple["Loops", Sequence]:
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
        return Loops.of(call, self.table, self.how, args), args

    def run(self, params, carry, consts) -> list:
        """Returns the output."""

        def body(carry, params_i):
            out = self.call(carry, params_i, consts)
            return out[: self.num_carry], out[self.num_carry :]

        carry, ys = lax.scan(body, carry, params, self.length, self.how.reverse)
        return [*carry, *ys]

    def forward(self, args, asked: Sequence[int]):
        """Returns the output, and what the backward pass is handed."""
        params, carry, consts = args
        moving = Moving.of(asked, params, carry, consts)
        outputs = (*inexact(carry), *(len(carry) + place for place in inexact(self.ys)))
        moving = dataclasses.replace(moving, outputs=outputs)
        first = int(self.table.rows["record"][0]) if self.table.keeps_last else self.length

        state = (carry, [zeros(self.length, aval) for aval in self.ys])
        sweep = self._sweep_to_host if self.how.offload else self._sweep_to_slots
        state, slots = sweep(params, consts, state, first)
        kept = []
        if self.table.keeps_last:
            recorder = self.recorder_of(moving)
            kept = recorder.empty(self.table.largest_row)
            blocks = (first, first, self.length, self.length - first)
            state, kept = self.record(recorder, params, consts, state, kept, *blocks)
        carry, ys = state
        return [*carry, *ys], (params, consts, slots, kept, moving)

    def _sweep_to_slots(self, params, consts, state, stop: int):
        """Runs blocks `0..stop`; returns carry and ys, and the slots: one store every trip."""

        def body(state, step):
            (carry, ys), slots = state
            index, slot = step
            slots = self.store(slots, slot, carry)
            return (self._emit(params, consts, (carry, ys), index), slots), None

        steps = (jnp.arange(stop), jnp.asarray(self.table.sweep_slots[:stop]))
        unroll = min(self.how.unroll, max(stop, 1))
        state = (state, self._slots(state[0]))
        return lax.scan(body, state, steps, length=stop, unroll=unroll)[0]

    def _sweep_to_host(self, params, consts, state, stop: int):
        """Does the same with one store a trip, of which each runs the blocks up to the next.

        Only what is kept goes over the link. The blocks of a trip have no fixed number, so that
        they are not unrolled.
        """
        stores = self.table.sweep_stores(stop)
        if not stores:
            return state, self._slots(state[0])

        def body(state, step):
            state, slots = state
            start, stop_i, slot = step
            slots = self.store(slots, slot, state[0])
            with trips(stop, len(stores)):
                emit = lambda i, state: self._emit(params, consts, state, i)
                state = lax.fori_loop(start, stop_i, emit, state)
            return (state, slots), None

        steps = tuple(jnp.asarray(column) for column in zip(*stores, strict=True))
        return lax.scan(body, (state, self._slots(state[0])), steps, length=len(stores))[0]

    def backward(self, residuals, grads, num_steps=None) -> list:
        """Returns the gradients that are asked for, of parameters, carry and consts.

        Args:
          residuals: What `forward` returned.
          grads: Of the output's inexact leaves, or `ad.Zero`.
          num_steps: How many of the L blocks ran, where that is known only now; then L is the most.
        """
        params, consts, slots, kept, moving = residuals
        places = inexact(slots)
        grad_carry, of_ys = instantiated(grads[: len(places)]), grads[len(places) :]
        y_places = moving.outputs[len(places) :]
        if not self.table.keeps_last:
            # Nothing is recorded yet, so that a y without a gradient is not differentiated at all.
            used = [n for n, grad in enumerate(of_ys) if not isinstance(grad, ad.Zero)]
            y_places, of_ys = pick(y_places, used), pick(of_ys, used)
        moving = dataclasses.replace(moving, outputs=(*places, *y_places))
        if self.table.records and not self.table.keeps_last:
            kept = self.recorder_of(moving).empty(self.table.largest_row)
        types = [self.ys[place - self.num_carry] for place in y_places]
        grad_ys = tuple(map(_reader, of_ys, types))
        back = _Back(
            loops=self,
            params=params,
            consts=consts,
            moving=moving,
            grad_ys=grad_ys,
            num_steps=num_steps,
        )
        grad_params = [jnp.zeros_like(params[i]) for i in moving.params]
        grad_consts = [jnp.zeros_like(consts[i]) for i in moving.consts]
        state = (slots, kept, grad_carry, grad_params, grad_consts)
        if num_steps is not None:
            state = back.run_until(state)
        else:
            loops = self.table.loops
            rows_a_trip = [(loop.rows.stop - loop.rows.start) // loop.trips for loop in loops]
            if self.how.offload and max(rows_a_trip) > 1:
                # A trip of several rows loads one carry more than it reverses, here over the link.
                loops = self.table.without_counts
            for loop in loops:
                state = back.run(loop, state)
        _, _, grad_carry, grad_params, grad_consts = state
        of_place = dict(zip(places, grad_carry, strict=True))
        return [*grad_params, *(of_place[i] for i in moving.carry), *grad_consts]

    def sweep(self, params, consts, carry, start, stop, count: int | None, told) -> list:
        """Runs blocks `start..stop` as `_loop` does; returns the carry alone."""
        body = lambda i, carry: self.next(params, consts, carry, i)[: self.num_carry]
        return _loop(start, stop, count, body, carry, told)

    def next(self, params, consts, carry, index) -> list:
        """Returns what block `index` returns."""
        return self.call(carry, slots_of.row(params, self.at(index)), consts)

    def at(self, index):
        """Returns the row that block `index` reads and writes."""
        return self.length - 1 - index if self.how.reverse else index

    def _emit(self, params, consts, state, index):
        """Runs block `index`, and writes its ys where they belong."""
        carry, ys = state
        out = self.next(params, consts, carry, index)
        return out[: self.num_carry], self._written(ys, out, index)

    def _written(self, ys, out, index) -> list:
        return slots_of.write(ys, self.at(index), out[self.num_carry :]) if ys else ys

    def record(
        self, recorder, params, consts, state, kept, base, start, stop, count=None, told=(1, 1)
    ):
        """Records blocks `start..stop`; block i's residuals go to place `i - base` of `kept`.

        Returns:
          The carry and the ys of `state`, and `kept`. Ys that are not handed in are not written.
        """

        def body(index, state):
            (carry, ys), kept = state
            row = slots_of.row(params, self.at(index))
            out, residuals = recorder.record(carry, row, consts)
            kept = slots_of.write(kept, index - base, row_major(residuals))
            return (out[: self.num_carry], self._written(ys, out, index)), kept

        return _loop(start, stop, count, body, (state, kept), told)

    def store(self, slots, slot, carry) -> list:
        """Returns the slots with a carry in one of them."""
        return slots_of.store(slots, slot, carry, on_host=self.how.offload)

    def _slots(self, carry) -> list:
        return slots_of.empty(carry, self.table.num_slots, on_host=self.how.offload)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Back:
    """The rows of a backward pass.

    Attributes:
      loops: The stack's.
      params: Leaves `[L, ...]`.
      consts: What all blocks share.
      moving: What is differentiated.
      grad_ys: Of each y among `moving.outputs`, what reads its gradient in a row.
      num_steps: As for `Loops.backward`.
    """

    loops: Loops
    params: list
    consts: list
    moving: Moving
    grad_ys: tuple
    num_steps: Any = None

    def run_until(self, state):
        """Runs the rows of the blocks that ran, all of them by one loop that reads its bounds."""
        table = self.loops.table
        (loop,) = table.without_counts
        rows = self._cut(table.rows)
        first = jnp.asarray(table.first_rows)[self.num_steps]
        body = lambda n, state: self._trip(loop, state, {k: x[n, None] for k, x in rows.items()})
        return lax.fori_loop(first, loop.trips, body, state)

    def _cut(self, columns: dict) -> dict:
        """Returns columns of the table, their blocks at most `num_steps`."""
        columns = {name: jnp.asarray(column) for name, column in columns.items()}
        if self.num_steps is None:
            return columns
        cut = lambda name, x: jnp.minimum(x, self.num_steps) if name in BLOCKS else x
        return {name: cut(name, column) for name, column in columns.items()}

    def run(self, loop: Loop, state):
        """Runs the rows of one loop of the table."""
        table = self.loops.table
        rows = {name: jnp.asarray(x[loop.rows]) for name, x in table.rows.items()}
        # Blocks that the forward pass has recorded are not recorded again.
        rows["again"] = rows["record"]
        if table.keeps_last and loop.rows.start == 0:
            rows["again"] = rows["again"].at[0].set(self.loops.length)
        rows = {name: x.reshape(loop.trips, -1) for name, x in rows.items()}
        body = lambda state, rows: (self._trip(loop, state, rows), None)
        if loop.trips == 1:
            return body(state, {name: x[0] for name, x in rows.items()})[0]
        return lax.scan(body, state, rows)[0]

    def _trip(self, loop: Loop, state, rows):
        """Loads, moves and advances by the first row, then records and reverses them all."""
        table, counts = self.loops.table, loop.counts
        num_rows = len(table.rows["load"])
        moves = self._cut(table.moves)
        steps = {name: jnp.asarray(column) for name, column in table.steps.items()}
        row = {name: column[0] for name, column in rows.items()}
        slots, rest = state[0], tuple(state[1:])

        def move(index, state):
            carry, slots = state
            start, stop = moves["start"][index], moves["stop"][index]
            told = (table.blocks_moved, table.num_moves)
            carry = self._sweep(carry, start, stop, counts and counts.move, told)
            return carry, self.loops.store(slots, moves["slot"][index], carry)

        def step(index, state):
            carry, slots = state
            loops = self.loops
            carry = loops.next(self.params, self.consts, carry, steps["block"][index])
            carry = carry[: loops.num_carry]
            return carry, self.loops.store(slots, steps["slot"][index], carry)

        carry = self._load(slots, row)
        state = (carry, slots)
        by_block = counts is None and self.num_steps is None and self.loops.moves_by_block
        if table.num_moves and by_block:
            blocks, told = (row["first_step"], row["last_step"]), (table.blocks_moved, num_rows)
            carry, slots = _loop(*blocks, None, step, state, told)
        elif table.num_moves:
            blocks, told = (row["first_move"], row["last_move"]), (table.num_moves, num_rows)
            carry, slots = _loop(*blocks, counts and counts.moves, move, state, told)
        told = (table.blocks_advanced, num_rows)
        carry = self._sweep(carry, row["advance"], row["record"], counts and counts.advance, told)
        if self.num_steps is not None:
            reverse = lambda: tuple(self._reverse(counts, carry, row, rest))
            return slots, *lax.cond(row["record"] < row["stop"], reverse, lambda: rest)
        if rows["load"].shape[0] == 1:
            return slots, *self._reverse(counts, carry, row, rest)

        # The first row has its carry; each of the others loads its own when the last one is done.
        def body(state, row):
            carry, rest = state
            rest = self._reverse(counts, carry, row, rest)
            return (self._load(slots, {"load": row["next"]}), rest), None

        rows["next"] = jnp.roll(rows["load"], -1)
        (_, rest), _ = lax.scan(body, (carry, rest), rows)
        return slots, *rest

    def _load(self, slots, row) -> list:
        return slots_of.load(slots, row["load"], on_host=self.loops.how.offload)

    def _sweep(self, carry, *blocks) -> list:
        return self.loops.sweep(self.params, self.consts, carry, *blocks)

    def _reverse(self, counts: Counts | None, carry, row, state):
        """Records and reverses the blocks of one row."""
        kept, *grads = state
        loops = self.loops
        if not loops.table.records:
            params_i = slots_of.row(self.params, loops.at(row["record"]))
            _, reverse = differentiate(loops.call, carry, params_i, self.consts, self.moving)
            return kept, *self._accumulated(reverse, row["record"], *grads)
        recorder = loops.recorder_of(self.moving)
        num_rows = len(loops.table.rows["load"])
        first = int(loops.table.rows["record"][0]) if loops.table.keeps_last else loops.length
        blocks = (row["record"], row["again"], row["stop"], counts and counts.again)
        (carry, _), kept = loops.record(
            recorder, self.params, self.consts, (carry, []), kept, *blocks, (first, num_rows)
        )

        def reverse_block(count, grads):
            index = row["stop"] - 1 - count
            residuals = row_major(slots_of.row(kept, index - row["record"]))
            params_i = slots_of.row(self.params, loops.at(index))
            reverse = recorder.reverse(residuals, params_i, self.consts)
            return self._accumulated(reverse, index, *grads)

        number, told = row["stop"] - row["record"], (loops.length, num_rows)
        count = counts and counts.reverse
        return kept, *_loop(0, number, count, reverse_block, tuple(grads), told)

    def _accumulated(self, reverse: Callable, index, grad_carry, grad_params, grad_consts):
        """Reverses one block: its parameters' gradients are written, the consts' are added."""
        place = self.loops.at(index)
        of_ys = [read(place) for read in self.grad_ys]
        grad_carry, of_params, of_consts = reverse([*grad_carry, *of_ys])
        grad_params = slots_of.write(grad_params, place, of_params)
        return grad_carry, grad_params, [a + b for a, b in zip(grad_consts, of_consts, strict=True)]


def _loop(start, stop, count: int | None, body: Callable, state, told: tuple[int, int] = (1, 1)):
    """Returns `lax.fori_loop(start, stop, body, state)`.

    Args:
      start: The first index.
      stop: One past the last.
      count: Their number, if it is known.
      body: As for `lax.fori_loop`.
      state: The same.
      told: For a loop of unknown number, its trips in all and in how many runs (`jaxprs.trips`).
    """
    if count is None:
        with trips(*told):
            return lax.fori_loop(start, stop, body, state)
    if count == 0:
        return state
    if count == 1:
        return body(start, state)
    return lax.fori_loop(0, count, lambda n, state: body(start + n, state), state)


def _reader(grad, aval) -> Callable:
    """Returns what reads the gradient of a y in a row; of one that nobody uses it is zero."""
    if isinstance(grad, ad.Zero):
        zero = zeros(1, aval)[0]
        return lambda place: zero
    return lambda place: lax.dynamic_index_in_dim(grad, place, keepdims=False)
