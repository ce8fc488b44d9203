"""`Schedule`: actions as frozen data, and the simulator that replays, refuses and counts them.

The simulator's time is linear in the number of actions and blocks. It counts bytes by the model in
`simulate`, which `optimal_chain` plans with; `measure` tells the bytes of a compiled program.
"""

import dataclasses
import functools
import itertools
import math
import numbers
from typing import cast

from jaxckpt.schedules.actions import Action, Advance, Free, Load, Record, Reverse, Store, whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainCosts:
    """Costs and sizes of each block of a chain; sequences are turned into tuples.

    Attributes:
      forward: The cost of each block's forward pass, L numbers in any unit, such as seconds.
      backward: The cost of each block's backward pass, L numbers in the same unit.
      carry_bytes: The bytes of the chain's input and of each block's output, L + 1 integers. The
        gradient of a carry has the carry's size.
      residual_bytes: The bytes of each block's residuals, with its output, L integers.

    Raises:
      TypeError: A size is not an integer.
      ValueError: Lengths differ, a number is negative or not finite, or residuals are smaller than
        the output that they include.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    carry_bytes: tuple[int, ...]
    residual_bytes: tuple[int, ...]

    def __post_init__(self):
        for name in ("forward", "backward", "carry_bytes", "residual_bytes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        num_blocks = len(self.forward)
        if num_blocks == 0:
            raise ValueError("forward is empty; a chain has at least 1 block")
        for name, length in (
            ("backward", num_blocks),
            ("carry_bytes", num_blocks + 1),
            ("residual_bytes", num_blocks),
        ):
            if len(getattr(self, name)) != length:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries; "
                    f"a chain of {num_blocks} blocks (as forward says) needs {length}"
                )
        for name in ("forward", "backward"):
            for block, cost in enumerate(getattr(self, name)):
                if not isinstance(cost, numbers.Real) or not 0 <= cast(float, cost) < math.inf:
                    raise ValueError(
                        f"{name}[{block}] is {cost!r}; a cost is a finite number, at least 0"
                    )
        for name in ("carry_bytes", "residual_bytes"):
            sizes = enumerate(getattr(self, name))
            sizes = tuple(whole(f"{name}[{i}]", size, least=0) for i, size in sizes)
            object.__setattr__(self, name, sizes)
        for block, size in enumerate(self.residual_bytes):
            if size < self.carry_bytes[block + 1]:
                raise ValueError(
                    f"residual_bytes[{block}] is {size}, less than the block's output, "
                    f"carry_bytes[{block + 1}] = {self.carry_bytes[block + 1]}, which it includes"
                )

    @property
    def num_blocks(self) -> int:
        """The number of blocks, L."""
        return len(self.forward)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The carries of a stack that are kept, and the order in which its blocks are recomputed.

    Hashable; equality ignores the name.

    Attributes:
      num_blocks: The number of blocks, L.
      actions: The actions in order; any iterable is turned into a tuple.
      name: The call that made it, for `str`.
      costs: The costs and sizes of the blocks; None if unknown, and then `extra_forward_cost`,
        `total_cost` and `peak_bytes` are None too.
      unit_bytes: The size that a planner rounded all bytes to; 1 if nothing was rounded.

    Raises:
      TypeError: `num_blocks` is no integer, or an action is none of the six.
      ValueError: There are no blocks, or `costs` are of another number of blocks.
    """

    num_blocks: int
    actions: tuple[Action, ...]
    name: str = dataclasses.field(default="schedule", compare=False)
    costs: ChainCosts | None = None
    unit_bytes: int = 1

    def __post_init__(self):
        whole("num_blocks", self.num_blocks, least=1)
        whole("unit_bytes", self.unit_bytes, least=1)
        object.__setattr__(self, "actions", tuple(self.actions))
        for number, action in enumerate(self.actions):
            if not isinstance(action, Action):
                raise TypeError(f"action {number} is {action!r}; a schedule is made of actions")
        if self.costs is not None and self.costs.num_blocks != self.num_blocks:
            raise ValueError(
                f"costs are of {self.costs.num_blocks} blocks, the schedule has {self.num_blocks}"
            )

    @functools.cached_property
    def counts(self) -> "Counts":
        """The counts of `simulate`, replayed once; raises `IllegalSchedule` as it does."""
        return simulate(self)

    @property
    def peak_slots(self) -> int:
        """The most slots in use at once; the stack's input counts if it is stored."""
        return self.counts.peak_slots

    @property
    def extra_forwards(self) -> int:
        """Blocks advanced and recorded beyond L: REVOLVE's count of recomputed forward steps."""
        return self.counts.extra_forwards

    @property
    def extra_forward_cost(self) -> float | None:
        """The extra forwards, each block weighed by its forward cost; None without costs."""
        return self.counts.extra_forward_cost

    @property
    def total_cost(self) -> float | None:
        """The cost of all forward, recomputed and backward passes; None without costs."""
        if self.costs is None or self.extra_forward_cost is None:
            return None
        return sum(self.costs.forward) + sum(self.costs.backward) + self.extra_forward_cost

    @property
    def peak_bytes(self) -> int | None:
        """The most bytes held at once, by the model of `simulate`; None without costs."""
        return self.counts.peak_bytes

    def __str__(self) -> str:
        text = (
            f"{self.name}: {_plural(self.num_blocks, 'block')}, "
            f"{_plural(self.extra_forwards, 'extra forward')}, {_plural(self.peak_slots, 'slot')}"
        )
        return text if self.peak_bytes is None else f"{text}, peak {self.peak_bytes:,} bytes"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


class IllegalSchedule(ValueError):
    """A schedule cannot be run: the action, its fault, and the state before it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """The counts of a legal schedule.

    Attributes:
      advanced: How many times blocks are run without keeping residuals.
      recorded: How many times blocks are run with their residuals kept: L.
      extra_forwards: `advanced + recorded - L`.
      peak_slots: The most slots in use at once.
      peak_residual_blocks: The most blocks whose residuals are held at once.
      evaluations: How often each block is run forward, L numbers.
      loads: Number of `Load` actions.
      stores: Number of `Store` actions.
      extra_forward_cost: Forwards beyond each block's first, weighed by cost; None without costs.
      peak_bytes: The most bytes held at once; None without costs.
    """

    advanced: int
    recorded: int
    extra_forwards: int
    peak_slots: int
    peak_residual_blocks: int
    evaluations: tuple[int, ...]
    loads: int
    stores: int
    extra_forward_cost: float | None
    peak_bytes: int | None


def simulate(schedule: Schedule, *, costs: ChainCosts | None = None) -> Counts:
    """Replays a schedule action by action and returns its counts.

    With costs, bytes are counted by the model of Beaumont et al. 2019 ("Optimal checkpointing for
    heterogeneous chains", section 3 and equation 1, without their overheads). At any time it holds:

    - the residuals of every recorded block;
    - the carry in every slot, and the input of every recorded block until its reversal; a carry
      that is both counts once;
    - the current carry, once, while some later action reads it;
    - the gradient of the output of the last block not yet reversed, from the start on.

    A forward step also holds its output, which a recorded step has among its residuals. The chain's
    input and its gradient never count, nor does a carry that is the output of a recorded block. In
    a backward step the gradient of the block's input replaces the gradient of its output.

    Args:
      schedule: The schedule to replay.
      costs: Costs and sizes of the blocks, in place of `schedule.costs`.

    Raises:
      IllegalSchedule: An action is illegal in its place, or blocks are left to reverse or slots in
        use at the end.
      ValueError: `costs` are of another number of blocks.

    Examples:
      >>> block = Record(start=0, stop=1), Reverse(block=0)
      >>> simulate(Schedule(num_blocks=1, actions=block)).evaluations
      (1,)
    """
    if costs is not None:
        schedule = dataclasses.replace(schedule, costs=costs)
    machine = _Machine(schedule.num_blocks)
    meter = _Bytes(machine, schedule.costs) if schedule.costs else None
    reads_current = _reads_current_later(schedule.actions)
    for number, action in enumerate(schedule.actions):
        if problem := machine.problem(action):
            raise IllegalSchedule(f"action {number}, {action}: {problem}; state: {machine}")
        if meter:
            meter.run(action, reads_current[number])
        machine.run(action)
    if machine.next_reverse >= 0 or machine.slots:
        problem = "blocks are left to reverse" if machine.next_reverse >= 0 else "slots are in use"
        end = len(schedule.actions)
        raise IllegalSchedule(f"end, after {end} actions: {problem}; state: {machine}")
    return _counts(machine, schedule.costs, meter)


def _counts(machine: "_Machine", costs: ChainCosts | None, meter: "_Bytes | None") -> Counts:
    evaluations = tuple(itertools.accumulate(machine.evaluation_steps[:-1]))
    return Counts(
        advanced=machine.advanced,
        recorded=machine.recorded,
        extra_forwards=machine.advanced + machine.recorded - machine.num_blocks,
        peak_slots=machine.peak_slots,
        peak_residual_blocks=machine.peak_residual_blocks,
        evaluations=evaluations,
        loads=machine.loads,
        stores=machine.stores,
        extra_forward_cost=None if costs is None else _extra_cost(costs, evaluations),
        peak_bytes=None if meter is None else meter.peak,
    )


def _extra_cost(costs: ChainCosts, evaluations: tuple[int, ...]) -> float:
    return sum(cost * (n - 1) for cost, n in zip(costs.forward, evaluations, strict=True))


def _reads_current_later(actions: tuple[Action, ...]) -> list[bool]:
    """Returns, for each action, whether a later action reads the current carry after it."""
    reads, result = False, []
    for action in reversed(actions):
        result.append(reads)
        if isinstance(action, Store | Advance | Record):
            reads = True
        elif isinstance(action, Load):
            reads = False
    return result[::-1]


class _Machine:
    """The state that actions change, and the counts so far."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.current = 0
        self.slots: dict[int, int] = {}
        self.is_recorded = [False] * num_blocks
        self.next_reverse = num_blocks - 1
        self.advanced = self.recorded = self.loads = self.stores = 0
        self.peak_slots = self.peak_residual_blocks = self.residual_blocks = 0
        # Differences between neighbours: a long Advance takes no more time than a short one.
        self.evaluation_steps = [0] * (num_blocks + 1)

    def problem(self, action: Action) -> str | None:
        """Returns the reason why `action` is illegal now; None if it is legal."""
        match action:
            case Store(slot) if slot in self.slots:
                return f"slot {slot} already holds carry {self.slots[slot]}"
            case Load(slot) | Free(slot) if slot not in self.slots:
                return f"slot {slot} is empty"
            case Advance(start, stop) | Record(start, stop):
                if stop > self.num_blocks:
                    return f"the last block is {self.num_blocks - 1}"
                if start != self.current:
                    return f"it starts from carry {start}, but the current carry is {self.current}"
                if isinstance(action, Record):
                    return self._record_problem(start, stop)
            case Reverse(block):
                if block != self.next_reverse:
                    return "blocks are reversed from the last to the first, each once"
                if not self.is_recorded[block]:
                    return f"block {block} is not recorded"
        return None

    def _record_problem(self, start: int, stop: int) -> str | None:
        if stop - 1 > self.next_reverse:
            return f"block {stop - 1} is already reversed"
        for block in range(start, stop):
            if self.is_recorded[block]:
                return f"block {block} is already recorded"
        return None

    def run(self, action: Action):
        """Runs an action that has no `problem`."""
        match action:
            case Store(slot):
                self.slots[slot] = self.current
                self.stores += 1
                self.peak_slots = max(self.peak_slots, len(self.slots))
            case Load(slot):
                self.current = self.slots[slot]
                self.loads += 1
            case Free(slot):
                del self.slots[slot]
            case Advance(start, stop):
                self._evaluate(start, stop)
                self.advanced += stop - start
            case Record(start, stop):
                self._evaluate(start, stop)
                self.recorded += stop - start
                self.is_recorded[start:stop] = [True] * (stop - start)
                self.residual_blocks += stop - start
                self.peak_residual_blocks = max(self.peak_residual_blocks, self.residual_blocks)
            case Reverse(block):
                self.is_recorded[block] = False
                self.residual_blocks -= 1
                self.next_reverse -= 1

    def _evaluate(self, start: int, stop: int):
        self.evaluation_steps[start] += 1
        self.evaluation_steps[stop] -= 1
        self.current = stop

    def __str__(self) -> str:
        recorded = [block for block in range(self.num_blocks) if self.is_recorded[block]]
        left = f"next to reverse {self.next_reverse}" if self.next_reverse >= 0 else "all reversed"
        return f"current carry {self.current}, slots {self.slots}, recorded {recorded}, {left}"


class _Bytes:
    """The bytes held; counts each action before the machine runs it."""

    def __init__(self, machine: _Machine, costs: ChainCosts):
        self.machine = machine
        self.carry_bytes, self.residual_bytes = costs.carry_bytes, costs.residual_bytes
        self.in_slots = [0] * (machine.num_blocks + 1)  # how many slots hold each carry
        self.recorded = [False] * (machine.num_blocks + 1)
        self.held = self.peak = 0
        self.pairs = [before + after for before, after in itertools.pairwise(self.carry_bytes)]

    def run(self, action: Action, is_read_later: bool):
        """Counts one legal action: the peak while it runs, and the bytes after it."""
        current = self.machine.current
        gradient = self._gradient(self.machine.next_reverse + 1)
        match action:
            case Store():
                self._keep(current, 1)
            case Load(slot):
                current = self.machine.slots[slot]
            case Free(slot):
                self._keep(self.machine.slots[slot], -1)
            case Advance(start, stop):
                step = self._beside(start) + self.carry_bytes[start + 1]
                # The maximum of a slice is one call, however many blocks are run.
                step = max(step, max(self.pairs[start + 1 : stop], default=0))
                self._reach(step + gradient)
                current = stop
            case Record(start, stop):
                for block in range(start, stop):
                    self._record(block, True)
                    self._reach(gradient)
                current = stop
            case Reverse(block):  # holds no more than the action before it
                self._record(block, False)
                gradient = self._gradient(block)
        self._reach(gradient + is_read_later * self._beside(current))

    def _reach(self, beside: int):
        self.peak = max(self.peak, self.held + beside)

    def _gradient(self, carry: int) -> int:
        return self.carry_bytes[carry] if carry else 0

    def _is_free(self, carry: int) -> bool:
        return carry == 0 or self.recorded[carry - 1]

    def _beside(self, carry: int) -> int:
        """Returns the bytes of the current carry; 0 if it is counted already."""
        is_held = self.in_slots[carry] or self.recorded[carry] or self._is_free(carry)
        return 0 if is_held else self.carry_bytes[carry]

    def _weight(self, carry: int) -> int:
        copies = 0 if self._is_free(carry) else max(self.in_slots[carry], self.recorded[carry])
        return copies * self.carry_bytes[carry]

    def _keep(self, carry: int, slots: int):
        before = self._weight(carry)
        self.in_slots[carry] += slots
        self.held += self._weight(carry) - before

    def _record(self, block: int, value: bool):
        # A recorded block holds its input; its output is among its residuals.
        before = self._weight(block) + self._weight(block + 1)
        self.recorded[block] = value
        self.held += self._weight(block) + self._weight(block + 1) - before
        self.held += self.residual_bytes[block] if value else -self.residual_bytes[block]
