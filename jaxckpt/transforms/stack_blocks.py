"""The blocks of a stack, as the loops of its forward and backward pass run them one by one.

A `Blocks` knows what is static: the block, the schedule's table, how it is run. Parameters, carry,
consts and slots are arguments. `run_loop` is the one loop that they are run by.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Self

import jax
from jax import lax

from jaxckpt.transforms import rows as slots_of
from jaxckpt.transforms.block_vjp import Moving, Recorder
from jaxckpt.transforms.jaxprs import trips
from jaxckpt.transforms.rows import row_major
from jaxckpt.transforms.tables import Table
from jaxckpt.transforms.traced_block import abstract, first_block

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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """One stack's blocks, run one by one; every array is an argument.

    Attributes:
      call: As for `stack_executor.run_schedule`.
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
    def of(cls, call: Callable, table: Table, how: How, args: Sequence) -> Self:
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
            moves_by_block=not how.offload and carry_bytes <= _SMALL_CARRY,
            recorder_of=functools.cache(functools.partial(Recorder.trace, record, *shapes)),
        )

    @property
    def length(self) -> int:
        """L."""
        return len(self.table.sweep_slots)

    def sweep(self, params, consts, carry, start, stop, count: int | None, told) -> list:
        """Runs blocks `start..stop` as `run_loop` does; returns the carry alone."""
        body = lambda i, carry: self.next(params, consts, carry, i)[: self.num_carry]
        return run_loop(start, stop, count, body, carry, told)

    def next(self, params, consts, carry, index) -> list:
        """Returns what block `index` returns."""
        return self.call(carry, slots_of.row(params, self.at(index)), consts)

    def at(self, index):
        """Returns the row that block `index` reads and writes."""
        return self.length - 1 - index if self.how.reverse else index

    def emit(self, params, consts, state, index):
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

        return run_loop(start, stop, count, body, (state, kept), told)

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
