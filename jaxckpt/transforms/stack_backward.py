"""The backward pass of a stack: the rows of its schedule's table, one after another.

A row loads a carry, runs blocks forward and stores carries again (its moves), then records and
reverses its own blocks. Rows that are alike are trips of one loop; see `tables.Table.loops`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from jaxckpt.transforms import rows as slots_of
from jaxckpt.transforms.block_vjp import Moving
from jaxckpt.transforms.custom_gradient import inexact, instantiated, pick
from jaxckpt.transforms.rows import row_major
from jaxckpt.transforms.stack_blocks import Blocks, run_loop
from jaxckpt.transforms.tables import BLOCKS, Counts, Loop
from jaxckpt.transforms.traced_block import zeros


def backward(blocks: Blocks, residuals, grads, num_steps=None) -> list:
    """Returns the gradients that are asked for, of parameters, carry and consts.

    Args:
      blocks: The stack.
      residuals: What `Loops.forward` returned for the backward pass.
      grads: Gradients of the output's inexact leaves; `ad.Zero` for an unused output.
      num_steps: The number of blocks that ran, a traced scalar of at most L; None if all L ran.
    """
    params, consts, slots, kept, moving = residuals
    places = inexact(slots)
    grad_carry, of_ys = instantiated(grads[: len(places)]), grads[len(places) :]
    y_places = moving.outputs[len(places) :]
    if not blocks.table.keeps_last:
        # Nothing is recorded yet, so a y without a gradient need not be differentiated.
        used = [n for n, grad in enumerate(of_ys) if not isinstance(grad, ad.Zero)]
        y_places, of_ys = pick(y_places, used), pick(of_ys, used)
    moving = dataclasses.replace(moving, outputs=(*places, *y_places))
    if blocks.table.records and not blocks.table.keeps_last:
        kept = blocks.recorder_of(moving).empty(blocks.table.largest_row)
    grad_ys = tuple(
        _reader(blocks, place - blocks.num_carry, grad)
        for place, grad in zip(y_places, of_ys, strict=True)
    )
    back = _Rows(
        blocks=blocks,
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
        loops = blocks.table.loops
        rows_a_trip = [(loop.rows.stop - loop.rows.start) // loop.trips for loop in loops]
        if blocks.how.offload and max(rows_a_trip) > 1:
            # A trip of several rows loads one carry too many, and here a load crosses the link.
            loops = blocks.table.without_counts
        for loop in loops:
            state = back.run(loop, state)
    _, _, grad_carry, grad_params, grad_consts = state
    of_place = dict(zip(places, grad_carry, strict=True))
    return [*grad_params, *(of_place[i] for i in moving.carry), *grad_consts]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """The rows of a backward pass, one after another.

    Attributes:
      blocks: The stack.
      params: Leaves `[L, ...]`.
      consts: Leaves that all blocks share.
      moving: The leaves that are differentiated.
      grad_ys: For each y among `moving.outputs`, a function from a block's index to the gradient
        of its y.
      num_steps: The number of blocks that ran; None if all L ran.
    """

    blocks: Blocks
    params: list
    consts: list
    moving: Moving
    grad_ys: tuple
    num_steps: Any = None

    def run_until(self, state):
        """Runs the rows of the blocks that ran, all of them by one loop that reads its bounds."""
        table = self.blocks.table
        (loop,) = table.without_counts
        rows = self._cut(table.rows)
        first = jnp.asarray(table.first_rows)[self.num_steps]
        body = lambda n, state: self._trip(loop, state, {k: x[n, None] for k, x in rows.items()})
        return lax.fori_loop(first, loop.trips, body, state)

    def _cut(self, columns: dict) -> dict:
        """Returns columns of the table, with indices of blocks cut at `num_steps`."""
        columns = {name: jnp.asarray(column) for name, column in columns.items()}
        if self.num_steps is None:
            return columns
        cut = lambda name, x: jnp.minimum(x, self.num_steps) if name in BLOCKS else x
        return {name: cut(name, column) for name, column in columns.items()}

    def run(self, loop: Loop, state):
        """Runs the rows of one loop of the table."""
        table = self.blocks.table
        rows = {name: jnp.asarray(x[loop.rows]) for name, x in table.rows.items()}
        # The forward pass may have recorded the first row's blocks already; none are recorded here.
        rows["again"] = rows["record"]
        if table.keeps_last and loop.rows.start == 0:
            rows["again"] = rows["again"].at[0].set(self.blocks.length)
        rows = {name: x.reshape(loop.trips, -1) for name, x in rows.items()}
        body = lambda state, rows: (self._trip(loop, state, rows), None)
        if loop.trips == 1:
            return body(state, {name: x[0] for name, x in rows.items()})[0]
        return lax.scan(body, state, rows)[0]

    def _trip(self, loop: Loop, state, rows):
        """Loads, moves and advances by the trip's first row; records and reverses all its rows."""
        table, counts = self.blocks.table, loop.counts
        num_rows = len(table.rows["load"])
        moves = self._cut(table.moves)
        row = {name: column[0] for name, column in rows.items()}
        slots, rest = state[0], tuple(state[1:])

        def move(index, state):
            carry, slots = state
            start, stop = moves["start"][index], moves["stop"][index]
            told = (table.blocks_moved, table.num_moves)
            carry = self._sweep(carry, start, stop, counts and counts.move, told)
            return carry, self.blocks.store(slots, moves["slot"][index], carry)

        carry = self.blocks.load(slots, row["load"])
        if counts is None and self.num_steps is None and self.blocks.moves_by_block:
            carry, slots = self._run_steps(row, carry, slots)
        else:
            if table.num_moves:
                moved, told = (row["first_move"], row["last_move"]), (table.num_moves, num_rows)
                count = counts and counts.moves
                carry, slots = run_loop(*moved, count, move, (carry, slots), told)
            told = (table.blocks_advanced, num_rows)
            last = (row["record"], counts and counts.advance)
            carry = self._sweep(carry, row["advance"], *last, told)
        if self.num_steps is not None:
            reverse = lambda: tuple(self._reverse(counts, carry, row, rest))
            return slots, *lax.cond(row["record"] < row["stop"], reverse, lambda: rest)
        if rows["load"].shape[0] == 1:
            return slots, *self._reverse(counts, carry, row, rest)

        # The first row's carry is here; each later row's is loaded once the row before it is done.
        def body(state, row):
            carry, rest = state
            rest = self._reverse(counts, carry, row, rest)
            return (self.blocks.load(slots, row["next"]), rest), None

        rows["next"] = jnp.roll(rows["load"], -1)
        (_, rest), _ = lax.scan(body, (carry, rest), rows)
        return slots, *rest

    def _run_steps(self, row, carry, slots):
        """Runs all blocks of a row that it does not record by one loop, which stores every carry.

        One loop asks a GPU's host once a block and once a row; a loop for each move asks more.
        """
        table, stack = self.blocks.table, self.blocks
        steps = {name: jnp.asarray(column) for name, column in table.steps.items()}

        def step(index, state):
            carry = stack.next(self.params, self.consts, state[0], steps["block"][index])
            carry = carry[: stack.num_carry]
            return carry, stack.store(state[1], steps["slot"][index], carry)

        told = (table.blocks_moved + table.blocks_advanced, len(table.rows["load"]))
        return run_loop(row["first_step"], row["last_step"], None, step, (carry, slots), told)

    def _sweep(self, carry, *blocks) -> list:
        return self.blocks.sweep(self.params, self.consts, carry, *blocks)

    def _reverse(self, counts: Counts | None, carry, row, state):
        """Records and reverses the blocks of one row."""
        kept, *grads = state
        stack = self.blocks
        if not stack.table.records:
            params_i = stack.params_of(self.params, row["record"])
            args = (carry, params_i, self.consts, self.moving)
            reverse = lambda grads: stack.reverse(*args, grads)
            return kept, *self._accumulated(reverse, row["record"], *grads)
        recorder = stack.recorder_of(self.moving)
        num_rows = len(stack.table.rows["load"])
        first = int(stack.table.rows["record"][0]) if stack.table.keeps_last else stack.length
        blocks = (row["record"], row["again"], row["stop"], counts and counts.again)
        (carry, _), kept = stack.record(
            recorder, self.params, self.consts, (carry, []), kept, *blocks, (first, num_rows)
        )

        def reverse_block(count, grads):
            index = row["stop"] - 1 - count
            residuals = row_major(slots_of.row(kept, index - row["record"]))
            params_i = stack.params_of(self.params, index)
            reverse = recorder.reverse(residuals, params_i, self.consts)
            return self._accumulated(reverse, index, *grads)

        number, told = row["stop"] - row["record"], (stack.length, num_rows)
        count = counts and counts.reverse
        return kept, *run_loop(0, number, count, reverse_block, tuple(grads), told)

    def _accumulated(self, reverse: Callable, index, grad_carry, grad_params, grad_consts):
        """Reverses one block; writes its parameters' gradients and adds up those of the consts."""
        of_ys = [read(index) for read in self.grad_ys]
        grad_carry, of_params, of_consts = reverse([*grad_carry, *of_ys])
        grad_params = self.blocks.with_grads(grad_params, self.moving.params, index, of_params)
        return grad_carry, grad_params, [a + b for a, b in zip(grad_consts, of_consts, strict=True)]


def _reader(blocks: Blocks, y: int, grad) -> Callable:
    """Returns a function from a block to the gradient of its y; zeros for a y that nobody uses.

    What a block of another kind reads meets a y of zeros, which has no derivative.
    """
    if isinstance(grad, ad.Zero):
        zero = zeros(1, blocks.ys[y])[0]
        return lambda index: zero
    return lambda index: lax.dynamic_index_in_dim(grad, blocks.y_rows(index)[y][0], keepdims=False)
