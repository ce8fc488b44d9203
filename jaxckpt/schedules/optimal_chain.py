"""Optimal checkpointing of a chain of different blocks under a budget of bytes (rotor).

Beaumont, Eyraud-Dubois, Herrmann, Joly and Shilova 2019, "Optimal checkpointing for heterogeneous
chains: how to train deep neural networks with limited memory", theorem 1. Each block is run with
nothing kept, with its input kept, or with all its residuals kept. Dynamic programming over runs of
blocks and units of memory finds the cheapest mixture. The optimum is over persistent schedules,
which keep a carry until its block is reversed. If carries differ much in size, a schedule that
drops a carry early and recomputes it may be cheaper still.

Time grows as L^3 times the units of memory; equal runs of blocks are solved once.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Sequence

from jaxckpt.schedules.actions import whole
from jaxckpt.schedules.recursive import Choose, unfold
from jaxckpt.schedules.schedule import ChainCosts, Schedule

MAX_UNITS = 2000  # A budget of at most this many units is exact; a larger budget is rounded.


class BudgetTooSmall(ValueError):
    """No persistent schedule fits the budget; `least_bytes` is the least budget that works."""

    def __init__(self, budget: int, least_bytes: int):
        super().__init__(budget, least_bytes)
        self.budget = budget
        self.least_bytes = least_bytes

    def __str__(self) -> str:
        return f"no schedule fits in {self.budget:,} bytes; the least is {self.least_bytes:,} bytes"


def optimal_chain(
    *,
    forward: Sequence[float],
    backward: Sequence[float],
    carry_bytes: Sequence[int],
    residual_bytes: Sequence[int],
    budget: int,
) -> Schedule:
    """Returns the persistent schedule with the least `extra_forward_cost` within `budget` bytes.

    Bytes are counted by the model of `simulate`, without the chain's input. Sizes are divided by
    their greatest common divisor. If the budget is still more than 2,000 units, sizes are rounded
    up, and the budget down, to units of `Schedule.unit_bytes`. The schedule then fits the budget,
    and is optimal for the rounded sizes. If nothing fits only because of rounding, the schedule
    with the least peak is returned.

    Args:
      forward: The cost of each block's forward pass, L numbers in any unit.
      backward: The cost of each block's backward pass, L numbers in the same unit.
      carry_bytes: The bytes of the chain's input and of each block's output, L + 1 integers.
      residual_bytes: The bytes of each block's residuals, with its output, L integers.
      budget: The bytes for kept carries, residuals and the carry's gradient.

    Raises:
      BudgetTooSmall: No schedule fits; its `least_bytes` is the least budget that works.
      TypeError: A size is not an integer.
      ValueError: Lengths differ, a number is negative, or residuals are smaller than the output.

    Examples:
      >>> schedule = optimal_chain(
      ...     forward=[1, 2, 1], backward=[2, 4, 2],
      ...     carry_bytes=[4, 4, 2, 2], residual_bytes=[12, 9, 6], budget=22)
      >>> schedule.extra_forward_cost, schedule.peak_bytes
      (1, 21)
    """
    costs = ChainCosts(
        forward=tuple(forward),
        backward=tuple(backward),
        carry_bytes=tuple(carry_bytes),
        residual_bytes=tuple(residual_bytes),
    )
    budget = whole("budget", budget, least=0)
    sizes = _Sizes(costs.carry_bytes, costs.residual_bytes)
    least_bytes, choose = _least_peak(costs.forward, sizes)
    if budget < least_bytes:
        raise BudgetTooSmall(budget, least_bytes)
    # A budget beyond keeping everything is useless, and would make the units coarser.
    room, unit_bytes, sizes = _in_units(min(budget, sizes.keep_all()), sizes)
    program = _Program(costs.forward, sizes, room)
    if program.is_feasible:
        choose = program.choose
    actions = unfold(costs.num_blocks, choose, room)
    name = f"optimal_chain(budget={budget})"
    return Schedule(costs.num_blocks, actions, name, costs, unit_bytes)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Sizes of a chain, and the room that one step of the recurrence needs.

    As in the paper, the room for a run of blocks does not include the run's input, and always
    includes the gradient of its output.
    """

    carry: tuple[int, ...]
    residual: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        return len(self.residual)

    def sweep(self, start: int, stop: int) -> int:
        """Returns the room for running all but the last block of a run; any schedule does this."""
        pairs = map(operator.add, self.carry[start + 1 : stop - 1], self.carry[start + 2 : stop])
        return self.carry[stop] + max(itertools.chain((self.carry[start + 1],), pairs))

    def record(self, block: int) -> int:
        """Returns the room for reversing a recorded block.

        Recording the block needs no more room than the later blocks of its run.
        """
        return self.residual[block] + self.carry[block + 1]

    def keep_all(self) -> int:
        """Returns the peak of recording the whole chain at once."""
        before = itertools.accumulate(self.residual[:-1], initial=0)
        return max(kept + self.record(i) for i, kept in enumerate(before))


def _in_units(budget: int, sizes: _Sizes) -> tuple[int, int, _Sizes]:
    """Returns the budget in units, the bytes rounded to (1 if exact), and the sizes in units."""
    divisor = math.gcd(*sizes.carry[1:], *sizes.residual) or 1
    is_exact = budget // divisor <= MAX_UNITS
    unit = divisor if is_exact else -(-budget // MAX_UNITS)
    carry, residual = (
        tuple(-(-size // unit) for size in group) for group in (sizes.carry, sizes.residual)
    )
    return budget // unit, 1 if is_exact else unit, _Sizes(carry, residual)


def _least_peak(forward: Sequence[float], sizes: _Sizes) -> tuple[int, Choose]:
    """Returns the least peak of any persistent schedule, in bytes, and the splits that reach it.

    This is the paper's recurrence with a peak in place of a cost, so it needs no table over memory.
    Among the splits with the least peak of a run, the cheapest is taken.
    """
    ran = tuple(itertools.accumulate(forward, initial=0))
    best: dict[tuple[int, int], tuple[int, float, int]] = {
        (block, block + 1): (sizes.record(block), 0, block) for block in range(sizes.num_blocks)
    }  # run -> (peak, extra cost, split)

    def ways(start: int, stop: int):
        peak, cost, _ = best[start + 1, stop]
        yield max(sizes.record(start), sizes.residual[start] + peak), cost, start
        sweep = sizes.sweep(start, stop)
        for split in range(start + 1, stop):
            (left, left_cost, _), (right, right_cost, _) = best[start, split], best[split, stop]
            cost = ran[split] - ran[start] + left_cost + right_cost
            yield max(sweep, left, sizes.carry[split] + right), cost, split

    for start, stop in _runs(sizes.num_blocks):
        best[start, stop] = min(ways(start, stop))
    peak = best[0, sizes.num_blocks][0]
    return peak, lambda start, stop, room: (best[start, stop][2], room)


def _runs(num_blocks: int):
    """Yields every run of at least two blocks, after all the runs inside it."""
    for length in range(2, num_blocks + 1):
        for start in range(num_blocks - length + 1):
            yield start, start + length


class _Program:
    """The dynamic program: for every run of blocks, a row of least extra costs by units of room.

    Rows are lists for `map`, because a loop in Python takes several times as long. Costs are
    floats: whole numbers are exact up to 2^53.
    """

    def __init__(self, forward: Sequence[float], sizes: _Sizes, room: int):
        self.sizes, self.room = sizes, room
        self.ran = tuple(itertools.accumulate(map(float, forward), initial=0.0))
        kinds = {}
        blocks = zip(forward, sizes.carry[1:], sizes.residual, strict=True)
        self.kinds = tuple(kinds.setdefault(block, len(kinds)) for block in blocks)
        self.rows, self.paid, self.behind = {}, {}, {}  # run -> the three rows that `_add` adds
        self.shared = {}
        for block in range(sizes.num_blocks):
            self._add(block, block + 1)
        for start, stop in _runs(sizes.num_blocks):
            self._add(start, stop)

    @property
    def is_feasible(self) -> bool:
        return self.rows[0, self.sizes.num_blocks][self.room] < math.inf

    def choose(self, start: int, stop: int, room: int) -> tuple[int, int]:
        """Returns the best split of a run and the room right of it, for `unfold`."""
        record = self._record_row(start, stop)[room], start
        splits = (
            (self.behind[split, stop][room] + self.paid[start, split][room], split)
            for split in range(start + 1, stop)
        )
        _, split = min(record, *splits)
        taken = self.sizes.residual[start] if split == start else self.sizes.carry[split]
        return split, room - taken

    def _add(self, start: int, stop: int):
        """Adds three rows of a run: its costs; its costs plus its forward cost, for a sweep that
        passes it first; its costs in the room that is left beside its kept input.

        Runs of equal blocks share rows: a stack of L equal blocks has L rows, not L^2 / 2.
        """
        run, kept = self.kinds[start:stop], self.sizes.carry[start]
        if run not in self.shared:
            row = self._row(start, stop)
            cost = self.ran[stop] - self.ran[start]
            self.shared[run] = row, [cost + extra for extra in row]
        self.rows[start, stop], self.paid[start, stop] = self.shared[run]
        if (run, kept) not in self.shared:
            self.shared[run, kept] = _shifted(self.rows[start, stop], kept)
        self.behind[start, stop] = self.shared[run, kept]

    def _row(self, start: int, stop: int) -> list[float]:
        record = self._record_row(start, stop)
        # With so much room that recording costs nothing extra, no split can be better.
        free = record.index(0.0) if record[-1] == 0.0 else len(record)
        if stop - start == 1:
            return record
        least = min(self.sizes.sweep(start, stop), free)
        ways: list[Iterable[float]] = [record[least:free]]
        for split in range(start + 1, stop):
            behind, paid = self.behind[split, stop], self.paid[start, split]
            ways.append(map(operator.add, behind[least:free], paid[least:free]))
        return [math.inf] * least + list(map(min, *ways)) + record[free:]

    def _record_row(self, start: int, stop: int) -> list[float]:
        """Returns the costs of recording the first block and treating the others optimally."""
        taken, least = self.sizes.residual[start], self.sizes.record(start)
        after = [0.0] * (self.room + 1) if stop - start == 1 else self.rows[start + 1, stop]
        row = _shifted(after, taken)
        return [math.inf] * min(least, len(row)) + row[least:]


def _shifted(row: list[float], units: int) -> list[float]:
    """Returns a row moved right by `units`: the costs by room if `units` of it are taken."""
    units = min(units, len(row))
    return [math.inf] * units + row[: len(row) - units]
