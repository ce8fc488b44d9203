"""One shape of `benchmarks.rivals`, for one fresh process that holds the chip. Imports no JAX."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.record import values_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A step, the budgets to plan for, and how often each program is timed.

    Attributes:
      batch_size: Sequences.
      seq_len: Tokens in each.
      budgets: How many, from the least that works to what `none` needs.
      rounds: Turns of each program.
      steps: Timed in a turn.
      tiny: A model for trying the script.
    """

    batch_size: int
    seq_len: int
    budgets: int = 5
    rounds: int = 7
    steps: int
    tiny: bool = False

    def changed(self, budgets: int, tiny: bool) -> "Case":
        """Returns the case with another number of budgets, or as a tiny one."""
        size = {"batch_size": 2, "seq_len": 64, "rounds": 3} if tiny else {}
        return dataclasses.replace(self, budgets=budgets, tiny=tiny, **size)

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return dataclasses.asdict(self)


SHAPES = {
    "8x1024": Case(batch_size=8, seq_len=1024, steps=5),
    "2x16384": Case(batch_size=2, seq_len=16384, steps=1),
}


def run_part(
    name: str, case: Case, seconds: float | None, environment: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Yields what is known of a shape, more each time, with what is being done as `says`.

    Args:
      name: The shape's.
      case: What is measured.
      seconds: What it may take; None for as long as it takes.
      environment: Of the process.

    Raises:
      RuntimeError: The process failed; with the last line that it wrote.
    """
    asked = (case.as_json(), seconds)
    yield from values_of("rivals_parts.process", *asked, environment=environment, name=name)
