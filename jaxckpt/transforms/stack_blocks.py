"""The blocks of a stack, run one by one by the loops of its forward and backward pass.

A `Blocks` holds what is static: the block, the schedule's table, the way it is run. Parameters,
carry, consts and slots are arguments. Every loop over blocks is a `run_loop`.
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
      first_row: The first row of the parameters that is one of these blocks; above 0 for a stage
        that reads the rows of the whole stack.
      casts_rows: A row's cast to a narrower dtype stays with the row. XLA casts the whole stack
        before a loop that only reads it: a copy of all parameters, half their size. So these loops
        hand the parameters on from trip to trip.
    """

    offload: bool = False
    unroll: int = 1
    checkpoint: Callable | None = None
    reverse: bool = False
    first_row: int = 0
    casts_rows: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """The rows of blocks in stacks that hold the blocks of one kind only.

    Attributes:
      kinds: A call for each kind; the first of a block's parameters says which is its own.
      params: For each leaf of the parameters, the row of every block in it, -1 for a block that has
        none; or None, if all L blocks have a row each, in their order.
      ys: The same for each leaf that blocks return beside their carry.
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
      places: Where rows are, for blocks of several kinds; None if row i is block i's.
      moves_by_block: All moves are one loop over blocks, which stores every carry.
      recorder_of: Returns the block's recorder for the leaves that are differentiated.
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
          told: As for `run_loop`.

        Returns:
          The parameters, unchanged, and the last state. With `casts_rows` these are to be used
          from then on: the ones before would have to be copied.
        """
        if not self.how.casts_rows:
            call = lambda index, state: body(index, params, state)[1]
            return params, run_loop(start, stop, count, call, state, told)

        def tied(index, both):
            index, params = self.tied(index, both[0])
            return body(index, params, both[1])

        return run_loop(start, stop, count, tied, (params, state), told)

    def tied(self, index, params) -> tuple[Any, list]:
        """Returns both unchanged; to XLA the parameters of every trip are other ones."""
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

        Of several kinds, only the residuals of the block's own exist: it is reversed in its branch.
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
        """Returns block `index`'s row of the parameters; any row of another kind's leaves."""
        at = [place for place, _ in self._rows_of("params", index, len(params))]
        return [slots_of.row([x], place)[0] for x, place in zip(params, at, strict=True)]

    def with_grads(self, grads, moving: Sequence[int], index, of_params) -> list:
        """Returns gradients of parameters with block `index`'s written, or added to zeros."""
        rows = self._rows_of("params", index, max(moving, default=-1) + 1)
        made = []
        for x, leaf, grad in zip(grads, moving, of_params, strict=True):
            place, is_own = rows[leaf]
            if is_own is not None:  # a block of another kind has a gradient of zero here
                grad = grad + slots_of.row([x], place)[0]
            made += slots_of.write([x], place, [grad])
        return made

    def y_rows(self, index) -> list[tuple]:
        """Returns, for each y, block `index`'s row and whether it has one; None if all have."""
        return self._rows_of("ys", index, len(self.ys))

    def y_count(self, place: int) -> int:
        """Returns how many blocks return the y at a place."""
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
        """Returns the row of the parameters that block `index` reads, if all blocks have one."""
        return self.place(index) + self.how.first_row

    def place(self, index):
        """Returns the row of the ys that block `index` writes, if all blocks have one."""
        return self.length - 1 - index if self.how.reverse else index

    def emit(self, params, consts, state, index):
        """Runs block `index`; returns its carry, and the stacked ys with its own written."""
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
      told: If `count` is None: all trips of this loop in a step, and in how many runs
        (`jaxprs.trips`).
    """
    if count is None:
        with trips(*told):
            return lax.fori_loop(start, stop, body, state)
    if count == 0:
        return state
    if count == 1:
        return body(start, state)
    return lax.fori_loop(0, count, lambda n, state: body(start + n, state), state)
