"""The backward pass of a stack: the rows of its schedule's table, one after another.

A row loads a carry, runs blocks forward and stores carries again (its moves), then records and
reverses its own blocks. Rows that are alike are trips of one loop; see `tables.Table.loops`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

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
    params, consts, slots, _, moving = residuals
    grad_params = [jnp.zeros_like(params[i]) for i in moving.params]
    grad_consts = [jnp.zeros_like(consts[i]) for i in moving.consts]
    made = (grad_params, grad_consts)
    grad_carry, made = reversed_stage(blocks, residuals, grads, made, num_steps)
    of_place = dict(zip(inexact(slots), grad_carry, strict=True))
    return [*made[0], *(of_place[i] for i in moving.carry), *made[1]]


class Update(Protocol):
    """How the gradients of a block are used once they are complete."""

    def params(self, given: list, made) -> list:
        """Returns the stack's parameters as they are now, leaves `[L, ...]`.

        Args:
          given: The parameters of the forward pass.
          made: The arrays that the backward pass has computed so far.
        """
        ...

    def with_params(self, made, params: list) -> Any:
        """Returns `made` with the same parameters as a loop returned them."""
        ...

    def write(self, made, place, grads: list) -> Any:
        """Returns `made` after the block at row `place` of the stack has its gradients."""
        ...


def reversed_stage(
    blocks: Blocks, residuals, grads, made: tuple, num_steps=None, update: Update | None = None
) -> tuple[list, tuple]:
    """Returns the gradients of a stage's carry, and `made` after all blocks of the stage.

    Args:
      blocks: The stage.
      residuals: What `Loops.forward` returned for the backward pass.
      grads: Gradients of the output's inexact leaves; `ad.Zero` for an unused output.
      made: The arrays that the backward pass computes for the parameters, which are gradients if
        there is no update; then the gradients of the consts.
      num_steps: The number of blocks that ran; None if all L ran.
      update: Takes each block's gradients; None to write them into arrays `[L, ...]`.
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
        update=update,
    )
    state: Any = (slots, kept, grad_carry, *made)
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
    _, _, grad_carry, *rest = state
    return grad_carry, tuple(rest)


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
      update: Takes a block's gradients; None to write them into the stacked ones.
    """

    blocks: Blocks
    params: list
    consts: list
    moving: Moving
    grad_ys: tuple
    num_steps: Any = None
    update: Update | None = None

    def read(self, made) -> list:
        """Returns the parameters: those in `made` if the backward pass updates parameters."""
        return self.params if self.update is None else self.update.params(self.params, made)

    def run_until(self, state):
        """Runs the rows of the blocks that ran, in one loop that reads its bounds from the rows."""
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
        # The forward pass may have recorded the first row's blocks already. `again` is the first
        # block to record: the length, so none, for such a row.
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
        params = self.read(rest[2])

        def move(index, params, state):
            carry, slots = state
            start, stop = moves["start"][index], moves["stop"][index]
            told = (table.blocks_moved, table.num_moves)
            params, carry = self._sweep(params, carry, start, stop, counts and counts.move, told)
            return params, (carry, self.blocks.store(slots, moves["slot"][index], carry))

        carry = self.blocks.load(slots, row["load"])
        if counts is None and self.num_steps is None and self.blocks.moves_by_block:
            params, (carry, slots) = self._run_steps(params, row, carry, slots)
        else:
            if table.num_moves:
                moved, told = (row["first_move"], row["last_move"]), (table.num_moves, num_rows)
                bounds = (*moved, counts and counts.moves)
                params, (carry, slots) = self.blocks.loop(
                    params, *bounds, move, (carry, slots), told
                )
            told = (table.blocks_advanced, num_rows)
            last = (row["record"], counts and counts.advance)
            params, carry = self._sweep(params, carry, row["advance"], *last, told)
        rest = self._with(params, rest)
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

    def _with(self, params, rest: tuple) -> tuple:
        """Returns the state of a trip with the parameters that a loop returned."""
        if self.update is None:
            return rest
        kept, grad_carry, made, grad_consts = rest
        return kept, grad_carry, self.update.with_params(made, params), grad_consts

    def _run_steps(self, params, row, carry, slots) -> tuple[list, tuple]:
        """Runs the blocks that a row moves and advances, in one loop that stores every carry.

        The host of a GPU reads each bound of a loop from the GPU. One loop needs fewer reads than
        one loop for each move.

        Returns:
          The parameters, as `Blocks.loop` does, and the carry and the slots.
        """
        table, stack = self.blocks.table, self.blocks
        steps = {name: jnp.asarray(column) for name, column in table.steps.items()}

        def step(index, params, state):
            carry = stack.next(params, self.consts, state[0], steps["block"][index])
            carry = carry[: stack.num_carry]
            return params, (carry, stack.store(state[1], steps["slot"][index], carry))

        told = (table.blocks_moved + table.blocks_advanced, len(table.rows["load"]))
        bounds = (row["first_step"], row["last_step"], None)
        return stack.loop(params, *bounds, step, (carry, slots), told)

    def _sweep(self, params, carry, *blocks) -> tuple[list, list]:
        return self.blocks.sweep(params, self.consts, carry, *blocks)

    def _reverse(self, counts: Counts | None, carry, row, state):
        """Records and reverses the blocks of one row."""
        kept, *grads = state
        stack, params = self.blocks, self.read(state[2])
        if not stack.table.records:
            params_i = stack.params_of(params, row["record"])
            args = (carry, params_i, self.consts, self.moving)
            reverse = lambda grads: stack.reverse(*args, grads)
            return kept, *self._accumulated(reverse, row["record"], *grads)
        recorder = stack.recorder_of(self.moving)
        num_rows = len(stack.table.rows["load"])
        first = int(stack.table.rows["record"][0]) if stack.table.keeps_last else stack.length
        blocks = (row["record"], row["again"], row["stop"], counts and counts.again)
        params, ((carry, _), kept) = stack.record(
            recorder, params, self.consts, (carry, []), kept, *blocks, (first, num_rows)
        )
        kept, *grads = self._with(params, (kept, *grads))

        def reverse_block(count, grads):
            index = row["stop"] - 1 - count
            residuals = row_major(slots_of.row(kept, index - row["record"]))
            params_i = stack.params_of(self.read(grads[1]), index)
            reverse = recorder.reverse(residuals, params_i, self.consts)
            return self._accumulated(reverse, index, *grads)

        number, told = row["stop"] - row["record"], (stack.length, num_rows)
        count = counts and counts.reverse
        return kept, *run_loop(0, number, count, reverse_block, tuple(grads), told)

    def _accumulated(self, reverse: Callable, index, grad_carry, made, grad_consts):
        """Reverses one block; writes its parameters' gradients and adds up those of the consts."""
        of_ys = [read(index) for read in self.grad_ys]
        grad_carry, of_params, of_consts = reverse([*grad_carry, *of_ys])
        if self.update is None:
            made = self.blocks.with_grads(made, self.moving.params, index, of_params)
        else:
            made = self.update.write(made, self.blocks.at(index), of_params)
        return grad_carry, made, [a + b for a, b in zip(grad_consts, of_consts, strict=True)]


def _reader(blocks: Blocks, y: int, grad) -> Callable:
    """Returns a function from a block's index to the gradient of its y; zeros for an unused y.

    A block whose kind has no such y gets the gradient of another block's row. The zeros that its
    branch returns for this y do not depend on anything, so that the gradient has no effect.
    """
    if isinstance(grad, ad.Zero):
        zero = zeros(1, blocks.ys[y])[0]
        return lambda index: zero
    return lambda index: lax.dynamic_index_in_dim(grad, blocks.y_rows(index)[y][0], keepdims=False)
