"""The blocks of a stack, run one by one by the loops of its forward and backward pass.

A `Blocks` holds only static values: the block, the schedule's table, and how the schedule is run.
Parameters, carry, consts and slots are arguments. Every loop over blocks is a `run_loop`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxckpt.transforms import rows as slots_of
from jaxckpt.transforms.block_vjp import Moving, Recorder, differentiate
from jaxckpt.transforms.jaxprs import trips
from jaxckpt.transforms.rows import row_major
from jaxckpt.transforms.tables import Table
from jaxckpt.transforms.traced_block import abstract, first_block

# Carries up to this many bytes are stored after every block of a move. A store takes less time than
# the host of a GPU needs to read the bound of a separate loop.
_SMALL_CARRY = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """How a schedule is run.

    Attributes:
      offload: Slots live in pinned host memory.
      unroll: Blocks unrolled in one trip of the forward pass; ignored if slots are on the host.
      checkpoint: Wraps a block before it is recorded; None if it is recorded as it is.
      reverse: The first block reads the last row, as in `lax.scan(..., reverse=True)`.
      first_row: The row of the parameters that the first of these blocks reads; above 0 for a later
        stage that reads the rows of the whole stack.
      casts_rows: Whether a row is cast to a narrower dtype inside the loop. Otherwise XLA moves the
        cast of the whole stack before a loop that only reads it, which copies all parameters at
        half their size. To prevent this, the loops carry the parameters from trip to trip.
    """

    offload: bool = False
    unroll: int = 1
    checkpoint: Callable | None = None
    reverse: bool = False
    first_row: int = 0
    casts_rows: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """The rows of each block where blocks are of several kinds, and some arrays are of one kind.

    Attributes:
      kinds: A call for each kind; the first of a block's parameters is the index of its kind.
      params: For each leaf of the parameters, the row of every block in the leaf, and -1 for a
      block
        without a row; or None, if the leaf has a row for each of the L blocks, in their order.
      ys: For each leaf of the ys, the row of every block in the leaf, and -1 for a block without a
        row; or None, if the leaf has a row for each of the L blocks, in their order.
    """

    kinds: tuple[Callable, ...]
    params: tuple[tuple[int, ...] | None, ...]
    ys: tuple[tuple[int, ...] | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """One stack's blocks, run one by one; every array is an argument.

    Attributes:
      call: `call(carry, params_i, consts) -> [*carry, *ys]`, all of them lists of leaves.
      table: The schedule, as the loops read it.
      how: Where slots live, the unrolling, the wrapper of a recorded block, the direction.
      ys: The types of the leaves that a block returns beside its carry.
      num_carry: The number of leaves of the carry.
      places: The rows of blocks of several kinds; None if block i reads row i of every leaf.
      moves_by_block: Whether all moves are one loop over blocks, which stores every carry.
      recorder_of: Returns the block's recorder for a `Moving`.
    """

    call: Callable
    table: Table
    how: How
    ys: list
    num_carry: int
    places: Places | None
    moves_by_block: bool
    recorder_of: Callable[[Moving], Recorder]

    @classmethod
    def of(
        cls, call: Callable, table: Table, how: How, args: Sequence, places: Places | None = None
    ) -> Self:
        """Returns the blocks for arguments of the types of `args`."""
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
            places=places,
            moves_by_block=not how.offload and carry_bytes <= _SMALL_CARRY,
            recorder_of=functools.cache(functools.partial(Recorder.trace, record, *shapes)),
        )

    @property
    def length(self) -> int:
        """The number of blocks, L."""
        return len(self.table.sweep_slots)

    def loop(
        self, params, start, stop, count: int | None, body: Callable, state, told=(1, 1)
    ) -> tuple[list, Any]:
        """Runs a loop over blocks that reads their parameters; see `run_loop`.

        Args:
          params: Leaves `[L, ...]`.
          start: The first index.
          stop: One past the last index.
          count: `stop - start` if it is a Python number, else None.
          body: `body(index, params, state) -> (params, state)`.
          state: The loop's first state.
          told: The trips of this loop in a step, as `run_loop` takes them.

        Returns:
          The parameters, unchanged, and the last state. With `casts_rows` the caller goes on with
          the returned parameters: reading the old ones again would make XLA copy them.
        """
        if not self.how.casts_rows:
            call = lambda index, state: body(index, params, state)[1]
            return params, run_loop(start, stop, count, call, state, told)

        def tied(index, both):
            index, params = self.tied(index, both[0])
            return body(index, params, both[1])

        return run_loop(start, stop, count, tied, (params, state), told)

    def tied(self, index, params) -> tuple[Any, list]:
        """Returns both unchanged, but XLA cannot assume that the parameters are those of before."""
        return lax.optimization_barrier((index, params))

    def sweep(self, params, consts, carry, start, stop, count: int | None, told):
        """Runs blocks `start..stop` as `loop` does; returns the parameters and the carry."""
        body = lambda i, params, carry: (
            params,
            self.next(params, consts, carry, i)[: self.num_carry],
        )
        return self.loop(params, start, stop, count, body, carry, told)

    def next(self, params, consts, carry, index) -> list:
        """Runs block `index`; returns its carry and ys."""
        return self.call(carry, self.params_of(params, index), consts)

    def reverse(self, carry, params_i, consts, moving: Moving, grads) -> tuple:
        """Runs a block and reverses it at once; takes and returns what `differentiate` does.

        Blocks of several kinds are reversed inside the branch of their kind, so that only the
        residuals of that kind are in memory.
        """

        def reversed_by(call: Callable) -> Callable:
            def run(carry, params_i, consts, grads):
                return differentiate(call, carry, params_i, consts, moving)[1](grads)

            return run

        if self.places is None:
            return reversed_by(self.call)(carry, params_i, consts, grads)
        branches = list(map(reversed_by, self.places.kinds))
        return lax.switch(params_i[0], branches, carry, params_i, consts, grads)

    def params_of(self, params, index) -> list:
        """Returns block `index`'s row of each leaf; any row of a leaf of another kind."""
        at = [place for place, _ in self._rows_of("params", index, len(params))]
        return [slots_of.row([x], place)[0] for x, place in zip(params, at, strict=True)]

    def with_grads(self, grads, moving: Sequence[int], index, of_params) -> list:
        """Returns gradients of parameters with block `index`'s written, or added to zeros."""
        rows = self._rows_of("params", index, max(moving, default=-1) + 1)
        made = []
        for x, leaf, grad in zip(grads, moving, of_params, strict=True):
            place, is_own = rows[leaf]
            if is_own is not None:  # the gradient of a block without a row here is zero
                grad = grad + slots_of.row([x], place)[0]
            made += slots_of.write([x], place, [grad])
        return made

    def y_rows(self, index) -> list[tuple]:
        """Returns, for each y, the row of block `index`, and whether it has one: None if all do."""
        return self._rows_of("ys", index, len(self.ys))

    def y_count(self, place: int) -> int:
        """Returns the number of blocks that return the y at a place."""
        rows = self.places and self.places.ys[place]
        return self.length if rows is None else max(rows) + 1

    def _rows_of(self, group: str, index, count: int) -> list[tuple]:
        of = (None,) * count if self.places is None else getattr(self.places, group)
        at = self.at(index) if group == "params" else self.place(index)
        found: dict[Any, tuple] = {None: (at, None)}
        for rows in of:
            if rows not in found:
                table = np.array(rows, np.int32)
                place = jnp.asarray(np.maximum(table, 0))[at]
                found[rows] = place, jnp.asarray(table >= 0)[at]
        return [found[rows] for rows in of]

    def at(self, index):
        """Returns the row that block `index` reads, for a leaf with a row for every block."""
        return self.place(index) + self.how.first_row

    def place(self, index):
        """Returns the row that block `index` writes, for a y that every block returns."""
        return self.length - 1 - index if self.how.reverse else index

    def emit(self, params, consts, state, index):
        """Runs block `index`; returns its carry, and the stacked ys with the block's ys written."""
        carry, ys = state
        out = self.next(params, consts, carry, index)
        return out[: self.num_carry], self._written(ys, out, index)

    def _written(self, ys, out, index) -> list:
        if not ys:
            return ys
        made = []
        for x, new, (place, is_own) in zip(
            ys, out[self.num_carry :], self.y_rows(index), strict=True
        ):
            if is_own is not None:
                new = jnp.where(is_own, new, slots_of.row([x], place)[0])
            made += slots_of.write([x], place, [new])
        return made

    def record(
        self, recorder, params, consts, state, kept, base, start, stop, count=None, told=(1, 1)
    ):
        """Records blocks `start..stop`; block i's residuals go to place `i - base` of `kept`.

        Returns:
          The parameters, as `loop` does, and `((carry, ys), kept)`. Ys are written only if `state`
          holds arrays for them.
        """

        def body(index, params, state):
            (carry, ys), kept = state
            row = self.params_of(params, index)
            out, residuals = recorder.record(carry, row, consts)
            kept = slots_of.write(kept, index - base, row_major(residuals))
            return params, ((out[: self.num_carry], self._written(ys, out, index)), kept)

        return self.loop(params, start, stop, count, body, (state, kept), told)

    def store(self, slots, slot, carry) -> list:
        """Returns the slots with a carry in one of them."""
        return slots_of.store(slots, slot, carry, on_host=self.how.offload)

    def slots(self, carry) -> list:
        """Returns the slots for carries like this one."""
        return slots_of.empty(carry, self.table.num_slots, on_host=self.how.offload)

    def load(self, slots, slot) -> list:
        """Returns the carry in a slot."""
        return slots_of.load(slots, slot, on_host=self.how.offload)


def run_loop(start, stop, count: int | None, body: Callable, state, told: tuple[int, int] = (1, 1)):
    """Returns `lax.fori_loop(start, stop, body, state)`.

    Args:
      start: The first index.
      stop: One past the last index.
      count: `stop - start` if it is a Python number, else None.
      body: `body(index, state) -> state`.
      state: The loop's first state.
      told: If `count` is None: the trips of all runs of this loop in a step, and the number of its
        runs (`jaxprs.trips`).
    """
    if count is None:
        with trips(*told):
            return lax.fori_loop(start, stop, body, state)
    if count == 0:
        return state
    if count == 1:
        return body(start, state)
    return lax.fori_loop(0, count, lambda n, state: body(start + n, state), state)
