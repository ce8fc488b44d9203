"""The six actions that a checkpointing schedule is made of, as frozen data.

    Schedule(num_blocks=2, actions=(
        Store(slot=0), Advance(start=0, stop=1), Record(start=1, stop=2), Reverse(block=1),
        Load(slot=0), Free(slot=0), Record(start=0, stop=1), Reverse(block=0)))

The machine that runs them has a current carry (index k is the input of block k; index L is the
stack's output), numbered slots that hold carries, and the recorded residuals of blocks. It starts
with carry 0 as the current carry and everything else empty. Actions check their own numbers;
`simulate` checks whether a sequence of them is legal.
"""

import dataclasses
import operator


def whole(name: str, value: int, *, least: int, most: int | None = None) -> int:
    """Returns `value` as an int between `least` and `most`.

    Raises:
      TypeError: `value` is not an integer, or is a bool.
      ValueError: `value` is out of range.
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
    """Makes the carry of a slot the current carry; the slot keeps it."""


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
    """Runs the backward pass of one block, which frees its recorded residuals."""

    block: int

    def __post_init__(self):
        whole("block", self.block, least=0)


Action = Store | Load | Free | Advance | Record | Reverse
