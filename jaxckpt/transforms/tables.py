"""A schedule's actions as integer tables that one compiled loop can follow.

The first sweep of a schedule becomes `sweep_slots`: the slot that each block's input is written to.
The actions after it are cut into rows, one for each group of blocks that are recorded and reversed
together. A row loads a slot, makes some moves (advance and store), advances to its first block,
records its blocks and reverses them.
"""

import dataclasses
import functools
import itertools

import numpy as np

from jaxckpt.schedules.actions import Advance, Free, Load, Record, Reverse, Store
from jaxckpt.schedules.schedule import Schedule

# The columns of rows and moves whose entries are indices of blocks; `while_loop` cuts them.
BLOCKS = frozenset(("advance", "record", "stop", "start"))
_COLUMNS = ("first_move", "last_move", "advance", "record", "stop")
_MOVE = ("start", "stop", "slot")

# The reversal of the block is compiled once for each loop. A schedule that needs more loops than
# this is run by one loop, which reads all its bounds from the table.
_MOST_LOOPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """The number of blocks that each trip of a loop runs, if it is equal for all trips.

    Attributes:
      moves: Moves that the first row of a trip makes.
      move: Blocks that each move runs.
      advance: Blocks that the first row runs after its moves.
      again: Blocks that each row records.
      reverse: Blocks that each row reverses.
    """

    moves: int
    move: int
    advance: int
    again: int
    reverse: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """Rows that one loop runs, with the same number of rows in every trip.

    In a trip of several rows, only the first row has moves and advances.

    Attributes:
      rows: The slice of the table's columns that this loop runs.
      trips: How many trips the loop makes.
      counts: The bounds of its inner loops; None if they are read from the rows.
    """

    rows: slice
    trips: int
    counts: Counts | None = None

    @property
    def stays_one(self) -> bool:
        """Whether XLA keeps the recomputed blocks inside a loop.

        XLA unrolls a loop of one trip. It may then merge recomputed blocks with the forward pass,
        and it allocates their residuals twice.
        """
        if self.counts is None:
            return False
        runs_again = self.counts.moves or self.counts.advance or self.counts.again
        return self.trips > 1 or not runs_again


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """What the executor's loops read; all arrays are int32.

    Attributes:
      num_slots: Slots in use, with the spare slot if the sweep or an advance needs one.
      keeps_last: The first row's blocks are recorded in the forward pass.
      sweep_slots: `[num_blocks]`: the slot that block i's input is written to in the forward pass.
        Every trip writes, so that all trips do the same work. An input that is not kept goes to
        the slot of the next store, which overwrites it, or, after the last store, to the spare.
      rows: Columns of `[number of rows]`: `load`, `first_move`, `last_move` (exclusive),
        `first_step`, `last_step` (exclusive), `free`, `advance`, `record`, `stop`. Blocks
        `advance..record` are run, blocks `record..stop` recorded and reversed.
      moves: Columns of `[number of moves]`: `start`, `stop`, `slot`.
      num_moves: Number of moves; if it is 0, the columns hold one unused entry.
      largest_row: The most blocks that are recorded together.
    """

    num_slots: int
    keeps_last: bool
    sweep_slots: np.ndarray
    rows: dict[str, np.ndarray]
    moves: dict[str, np.ndarray]
    num_moves: int
    largest_row: int

    def sweep_stores(self, stop: int) -> list[tuple[int, int, int]]:
        """Returns the stores of a first sweep over blocks `0..stop`, each `(start, stop, slot)`.

        The input of block `start` goes to `slot`; then blocks `start..stop` run.
        """
        slots = self.sweep_slots[:stop].tolist()
        starts = [n for n in range(stop) if n + 1 == stop or slots[n] != slots[n + 1]]
        stops = [*starts[1:], stop][: len(starts)]  # no blocks, no store
        return [(start, end, slots[start]) for start, end in zip(starts, stops, strict=True)]

    @property
    def records(self) -> bool:
        """Whether blocks are recorded in one loop and reversed in another."""
        return self.keeps_last or self.largest_row > 1

    @functools.cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The loops that run the rows: loops of known bounds if the schedule is regular, else one.

        On a GPU a loop whose bounds are read from a table waits for the host at every trip.
        """
        trips = self._trips()
        loops, start = [], 0
        for (counts, size), equals in itertools.groupby(trips):
            number = len(list(equals))
            stop = start + size * number
            loops.append(Loop(rows=slice(start, stop), trips=number, counts=counts))
            start = stop
        if len(loops) <= _MOST_LOOPS and all(loop.stays_one for loop in loops):
            return tuple(loops)
        return self.without_counts

    @property
    def without_counts(self) -> tuple[Loop, ...]:
        """The one loop that runs all rows and reads its bounds from them."""
        count = len(self.rows["load"])
        return (Loop(rows=slice(0, count), trips=count),)

    @functools.cached_property
    def first_rows(self) -> np.ndarray:
        """`[L + 1]`: entry `n` is the first row that matters if only blocks `0..n` are run."""
        least = len(self.sweep_slots)
        stops = self.moves["stop"][: self.num_moves].tolist()
        columns = zip(*(self.rows[name].tolist() for name in _COLUMNS), strict=True)
        # A row matters if it reverses a block before `n`, or stores the input of one.
        needs = [min([record, *stops[first:last]]) for first, last, _, record, _ in columns]
        first = [len(needs)] * (least + 1)
        for row in reversed(range(len(needs))):
            first[needs[row] + 1] = row
        for n in range(1, least + 1):
            first[n] = min(first[n], first[n - 1])
        return np.array(first, np.int32)

    def _trips(self) -> list[tuple[Counts | None, int]]:
        """Returns the rows cut into trips, each with its counts and its number of rows.

        A row that only loads joins the row before it that also ran blocks.
        """
        lengths = (self.moves["stop"] - self.moves["start"]).tolist()
        columns = zip(*(self.rows[name].tolist() for name in _COLUMNS), strict=True)
        trips: list[tuple[Counts | None, int]] = []
        for first_move, last_move, advance, record, stop in columns:
            moves = set(lengths[first_move:last_move])
            again = 0 if self.keeps_last and not trips else stop - record
            counts = Counts(
                moves=last_move - first_move,
                move=max(moves, default=0),
                advance=record - advance,
                again=again,
                reverse=stop - record,
            )
            if trips and not moves and not counts.advance:
                last, size = trips[-1]
                of_row = (counts.again, counts.reverse)
                if last and (last.moves or last.advance) and (last.again, last.reverse) == of_row:
                    trips[-1] = last, size + 1
                    continue
            trips.append((counts if len(moves) <= 1 else None, 1))
        return trips

    @functools.cached_property
    def steps(self) -> dict[str, np.ndarray]:
        """The blocks that rows run before they record, one by one: columns `block` and `slot`.

        In a move, every block's output is written to the move's slot, and the next block's output
        overwrites it. In an advance, outputs are written to a free slot. The last entry is unused.
        """
        moves = list(zip(*(self.moves[name].tolist() for name in _MOVE), strict=True))
        names = ("first_move", "last_move", "advance", "record", "free")
        columns = zip(*(self.rows[name].tolist() for name in names), strict=True)
        runs = [
            run
            for first, last, advance, record, free in columns
            for run in (*moves[first:last], (advance, record, free))
        ]
        starts, stops, slots = np.array([*runs, (0, 1, 0)], np.int32).T
        ranges = [np.arange(*pair) for pair in zip(starts, stops, strict=True)]
        return {
            "block": np.concatenate(ranges).astype(np.int32),
            "slot": np.repeat(slots, stops - starts),
        }

    @property
    def blocks_moved(self) -> int:
        """Blocks run by all moves together."""
        return int((self.moves["stop"] - self.moves["start"]).sum())

    @property
    def blocks_advanced(self) -> int:
        """Blocks run by all rows together between their moves and their records."""
        return int((self.rows["record"] - self.rows["advance"]).sum())


@functools.lru_cache(maxsize=64)  # a step is traced several times
def make_table(schedule: Schedule) -> Table:
    """Returns the table of a legal schedule.

    Raises:
      ValueError: A row does not begin with a load, or blocks are recorded apart and reversed
        together. The executor's loops cannot follow such a schedule; `jaxckpt.chain` can.
    """
    try:
        return _make_table(schedule)
    except ValueError as error:
        raise ValueError(
            f"{schedule.name} does not run over stacked blocks: {error}; jaxckpt.chain runs any "
            "schedule over a list of blocks"
        ) from None


def _make_table(schedule: Schedule) -> Table:
    groups = _groups(schedule)
    used = [action.slot for action in schedule.actions if isinstance(action, Store)]
    spare = max((slot + 1 for slot in used), default=0)
    keeps_last = not any(isinstance(action, Load) for action in groups[0])
    stores, first_row = _first_group(groups[0], spare, schedule.num_blocks)
    sweep_slots = np.full([schedule.num_blocks], spare, np.int32)
    for position, slot in sorted(stores.items(), reverse=True):
        sweep_slots[: position + 1] = slot
    rows = [first_row, *(_row(group) for group in groups[1:])]
    moves = [move for row in rows for move in row[1]]
    last = np.cumsum([len(row[1]) for row in rows])
    steps = np.cumsum([rec - (runs[0][0] if runs else adv) for _, runs, adv, rec, _ in rows])
    columns = zip(*((load, adv, rec, stop) for load, _, adv, rec, stop in rows), strict=True)
    load, advance, record, stop = (np.array(column, np.int32) for column in columns)
    free = _free_slots(rows)
    needed = (free[record > advance] + 1).tolist()
    return Table(
        num_slots=max([spare + int(keeps_last or spare in sweep_slots), *needed]),
        keeps_last=keeps_last,
        sweep_slots=sweep_slots,
        rows={
            "load": load,
            "first_move": np.array([0, *last[:-1]], np.int32),
            "last_move": last.astype(np.int32),
            "first_step": np.array([0, *steps[:-1]], np.int32),
            "last_step": steps.astype(np.int32),
            "free": free,
            "advance": advance,
            "record": record,
            "stop": stop,
        },
        # A table is never empty, so that it can be indexed in a loop of no trips.
        moves={
            name: np.array([move[column] for move in moves] or [0], np.int32)
            for column, name in enumerate(_MOVE)
        },
        num_moves=len(moves),
        largest_row=int((stop - record).max()),
    )


def _free_slots(rows: list[tuple]) -> np.ndarray:
    """Returns, for each row, a slot whose content no later row loads."""
    free, live = [], set()
    for load, moves, *_ in reversed(rows):
        free.append(next(slot for slot in itertools.count() if slot not in live))
        live = live.difference(slot for _, _, slot in moves) | {load}
    return np.array(free[::-1], np.int32)


def _groups(schedule: Schedule) -> list[list]:
    """Cuts the actions after every last `Reverse` of a row."""
    groups, group = [], []
    for action in schedule.actions:
        if group and isinstance(group[-1], Reverse) and not isinstance(action, Reverse):
            if isinstance(action, Free):  # a slot that its row no longer needs
                continue
            groups.append(group)
            group = []
        group.append(action)
    return [*groups, group]


def _first_group(group: list, spare: int, num_blocks: int) -> tuple[dict[int, int], tuple]:
    """Returns the first sweep's stores, `{input: slot}`, and the first row in `_row`'s form.

    A sweep that records its last blocks continues from its carry, which is in the spare slot. A
    sweep that runs to the end comes back by a load.
    """
    stores, position = {}, 0
    for place, action in enumerate(group):
        if isinstance(action, Store):
            stores[position] = action.slot
        elif isinstance(action, Advance):
            position = action.stop
        elif isinstance(action, Load):
            return stores, _row(group[place:])
        elif isinstance(action, Record):
            _check_reversed(group, action)
            return stores, (spare, [], action.start, action.start, num_blocks)
    raise ValueError("the schedule's first sweep records no block")


def _row(group: list) -> tuple[int, list[tuple[int, int, int]], int, int, int]:
    """Returns `(load, moves, advance, record, stop)` of a later row."""
    if not isinstance(group[0], Load):
        raise ValueError(f"a row of the executor starts with a load, not {group[0]}")
    moves, start, position = [], None, None
    for action in group[1:]:
        if isinstance(action, Advance):
            start = action.start if start is None else start
            position = action.stop
        elif isinstance(action, Store):
            if start is None:
                raise ValueError(f"{action} copies the carry that was just loaded")
            moves.append((start, position, action.slot))
            start = position
        elif isinstance(action, Record):
            _check_reversed(group, action)
            start = action.start if start is None else start
            return group[0].slot, moves, start, action.start, action.stop
        elif isinstance(action, Load):
            raise ValueError(f"a row of the executor loads one slot; {action} is a second")
    raise ValueError("a row of the schedule records no block")


def _check_reversed(group: list, record: Record):
    """Raises unless the row reverses all blocks that it records, from the last to the first."""
    reversed_blocks = [action.block for action in group if isinstance(action, Reverse)]
    if reversed_blocks != list(range(record.stop - 1, record.start - 1, -1)):
        raise ValueError(f"the executor reverses {record} at once, not in {reversed_blocks}")
