"""A checkpointing schedule as frozen data: seven small actions, and the `Schedule` they make up.

    Schedule(num_blocks=2, actions=(
        Store(slot=0), Advance(start=0, stop=1), Record(start=1, stop=2), Reverse(block=1),
        Load(slot=0), Free(slot=0), Record(start=0, stop=1), Reverse(block=0)))

The machine that runs them has a current carry (index k is the input of block k; index L is the
stack's output), numbered slots that hold carries, and the recorded residuals of blocks. It starts
with carry 0 as the current one and everything else empty. Actions check their own numbers where
they are made; whether a sequence of them is legal is what `simulate` says.
"""

import dataclasses
import functools
import math
import numbers
import operator
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from jaxckpt.plans.simulate import Counts


def whole(name: str, value: int, *, least: int, most: int | None = None) -> int:
    """Returns `value` as an int between `least` and `most`.

    Raises:
      TypeError: `value` is not an integer (a bool is not one here).
      ValueError: It is out of range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} is {value!r}; an integer is needed")
    if number < least or (most is not None and number > most):
        valid = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {number}; valid is {valid}")
    return number


@dataclasses.dataclass(frozen=True, slots=True)
class _SlotAction:
    slot: int

    def __post_init__(self):
        whole("slot", self.slot, least=0)


@dataclasses.dataclass(frozen=True, slots=True)
class _RunAction:
    start: int
    stop: int

    def __post_init__(self):
        whole("start", self.start, least=0)
        whole("stop", self.stop, least=self.start + 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Store(_SlotAction):
    """Copies the current carry into an empty slot."""


@dataclasses.dataclass(frozen=True, slots=True)
class Load(_SlotAction):
    """Makes the carry of a slot the current one; the slot keeps it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Free(_SlotAction):
    """Empties a slot."""


@dataclasses.dataclass(frozen=True, slots=True)
class Advance(_RunAction):
    """Runs blocks `start..stop-1` from carry `start` and keeps nothing; carry `stop` is current."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record(_RunAction):
    """Runs blocks `start..stop-1` like `Advance`, and keeps each block's residuals."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reverse:
    """The backward pass of one block: uses up its recorded residuals."""

    block: int

    def __post_init__(self):
        whole("block", self.block, least=0)


Action = Store | Load | Free | Advance | Record | Reverse


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainCosts:
    """What each block of a chain costs; sequences are turned into tuples.

    Attributes:
      forward: Cost of each block's forward pass (any unit, such as seconds), L numbers.
      backward: Cost of each block's backward pass, the same unit, L numbers.
      carry_bytes: Bytes of each carry, L + 1 integers: the chain's input, each block's output.
        The gradient of a carry weighs what the carry weighs.
      residual_bytes: Bytes of each block's residuals, L integers; its output is part of them.

    Raises:
      TypeError: A byte size that is not an integer.
      ValueError: Lengths that do not fit, a negative or non-finite number, or residuals smaller
        than the output that they include.
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
    """Which carries of a stack are kept, and in which order its blocks are run again.

    Hashable; schedules of other names are equal where the rest is.

    Attributes:
      num_blocks: Number of blocks, L.
      actions: What is done, in order; any iterable is turned into a tuple.
      name: The call that made it, for `str`.
      costs: Costs and sizes of the blocks, where they are known; then `extra_forward_cost`,
        `total_cost` and `peak_bytes` are numbers, else None.
      unit_bytes: The size that a planner rounded all bytes to; 1 where nothing was rounded.

    Raises:
      TypeError: `num_blocks` is no integer, or an action is not one of this module.
      ValueError: No block, or `costs` of another number of blocks.
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
        """What `simulate` counts, replayed once; raises `IllegalSchedule` where it does."""
        from jaxckpt.plans.simulate import simulate  # the simulator imports this module

        return simulate(self)

    @property
    def peak_slots(self) -> int:
        """The most slots in use at once; the stack's input counts where it is stored."""
        return self.counts.peak_slots

    @property
    def extra_forwards(self) -> int:
        """Blocks advanced and recorded beyond L: REVOLVE's count of forward steps run again."""
        return self.counts.extra_forwards

    @property
    def extra_forward_cost(self) -> float | None:
        """The same, each block weighed by its forward cost."""
        return self.counts.extra_forward_cost

    @property
    def total_cost(self) -> float | None:
        """Cost of one forward and backward pass of every block, and of the forwards run again."""
        if self.costs is None or self.extra_forward_cost is None:
            return None
        return sum(self.costs.forward) + sum(self.costs.backward) + self.extra_forward_cost

    @property
    def peak_bytes(self) -> int | None:
        """The most bytes held at once; `simulate` says what is counted."""
        return self.counts.peak_bytes

    def __str__(self) -> str:
        text = (
            f"{self.name}: {_plural(self.num_blocks, 'block')}, "
            f"{_plural(self.extra_forwards, 'extra forward')}, {_plural(self.peak_slots, 'slot')}"
        )
        return text if self.peak_bytes is None else f"{text}, peak {self.peak_bytes:,} bytes"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
