"""One part of `benchmarks.planner`: a step, a chip, budgets; planned for by one fresh process."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.record import values_of
from jaxckpt.absent import launch
from jaxckpt.targets.target import parse_target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A step, a chip and how many budgets to plan for; `tiny` is a model for trying the script."""

    target: str
    batch_size: int
    seq_len: int
    budgets: int
    tiny: bool = False

    def changed(self, budgets: int | None, tiny: bool) -> "Case":
        """Returns the case with another number of budgets, unless None, or as a tiny one."""
        size = {"batch_size": 2, "seq_len": 64, "tiny": True} if tiny else {}
        return dataclasses.replace(self, budgets=budgets or self.budgets, **size)

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return dataclasses.asdict(self)


def run_part(case: Case, done: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a case as they finish, from a fresh process with its chip's compiler.

    Args:
      case: Of an absent chip.
      done: Places of budgets that are not asked for again.

    Raises:
      RuntimeError: The process failed; with the last line that it wrote.
    """
    if len(done) >= case.budgets:
        return
    environment = launch.environment(parse_target(case.target))
    asked = (case.as_json(), list(done))
    yield from values_of("planner_parts.process", *asked, environment=environment, name=case.target)
