"""Across blocks: every plan worth a thought, with what it keeps, holds and costs.

Two kinds of stages are put together:

- runs of blocks under `none` or `full` with policies (`costs.Kind`). In a plan the stage that
  holds most while it is reversed stands first and the one that keeps most last: a stage's
  residuals are freed before the stages in front of it are reversed, and swapping two neighbors out
  of that order never lowers the peak. At most three kinds are mixed: of equal blocks under one
  budget two would do, were blocks divisible.
- schedules of the executor (`uniform`, `sqrt`, `log`, `binomial`), alone or before a run of kept
  blocks; where the host may be used, with their carries there, too.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from jaxckpt.memory.host_link import HostLink
from jaxckpt.planner.costs import Forward, Kind
from jaxckpt.planner.pieces import Piece, run_of, schedules
from jaxckpt.plans import Plan, Stage

_FEW_BLOCKS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A plan with its figures, of the stacks alone.

    Attributes:
      stages: Bound.
      kept_bytes: All that is kept when the last block has run.
      worst_bytes: The most that is kept and held while a stage is reversed.
      host_bytes: On the host.
      seconds: Of the stacks.
      flops: Of the stacks.
    """

    stages: tuple[Stage, ...]
    kept_bytes: float
    worst_bytes: float
    host_bytes: float
    seconds: float
    flops: float

    @property
    def plan(self) -> Plan:
        """The plan, its last count left out where it is the only one."""
        if len(self.stages) == 1:
            return Plan(stages=(dataclasses.replace(self.stages[0], count=None),))
        return Plan(stages=self.stages)

    @property
    def family(self) -> tuple:
        """Plans of one family are compiled alike, so one's error tells of another's."""
        is_loop = all(stage.schedule in ("none", "full") for stage in self.stages)
        policies = [policy for stage in self.stages for policy in stage.policies]
        is_moving = any(policy.kind == "offload" for policy in policies)
        return len(self.stages) > 1, is_loop, bool(policies), is_moving


def draft(pieces: Sequence[Piece]) -> Draft:
    """Returns the plan of some stages in order."""
    kept = worst = 0.0
    for piece in pieces:
        kept += piece.kept_bytes
        worst = max(worst, kept + piece.live_bytes)
    return Draft(
        stages=tuple(piece.stage for piece in pieces),
        kept_bytes=kept,
        worst_bytes=worst,
        host_bytes=sum(piece.host_bytes for piece in pieces),
        seconds=sum(piece.seconds for piece in pieces),
        flops=sum(piece.flops for piece in pieces),
    )


def drafts(
    kinds: Sequence[Kind], forward: Forward, num_blocks: int, link: HostLink | None = None
) -> Iterator[Draft]:
    """Yields every plan over some kinds.

    Args:
      kinds: `none` and `full` among them.
      forward: The cost of one more forward run of a block.
      num_blocks: L.
      link: As for `pieces.schedules`.
    """
    ordered = sorted(kinds, key=lambda kind: (-kind.live_bytes, kind.kept_bytes, str(kind)))
    for kind in ordered:
        yield draft([run_of(kind, num_blocks)])
    here = hull([kind for kind in ordered if not kind.host_bytes])
    mixed = here + [kind for kind in hull(ordered) if kind not in here]
    mixed.sort(key=ordered.index)
    runs = {(kind, count): run_of(kind, count) for kind in mixed for count in range(1, num_blocks)}
    for number, among in ((2, mixed), (3, here)):
        for chosen in itertools.combinations(among, number):
            for counts in _splits(num_blocks, number):
                if all(_is_run(*pair, num_blocks) for pair in zip(chosen, counts, strict=True)):
                    yield draft([runs[pair] for pair in zip(chosen, counts, strict=True)])
    if num_blocks > 1:
        for piece in schedules(ordered, forward, num_blocks, link):
            yield draft([piece])
    yield from _scheduled(here, runs, forward, num_blocks, link)


def hull(kinds: Sequence[Kind]) -> list[Kind]:
    """Returns the kinds that a mix of two others does not beat in bytes and seconds.

    `none` and `full` are always among them; the order is kept.
    """
    fastest = sorted(kinds, key=lambda kind: (kind.kept_bytes, kind.seconds))
    kept: list[Kind] = []
    for kind in fastest:
        if kept and kind.seconds >= kept[-1].seconds:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], kind):
            kept.pop()
        kept.append(kind)
    return [kind for kind in kinds if kind in kept or not kind.policies]


def _slope(less: Kind, more: Kind) -> float:
    return (more.seconds - less.seconds) / max(more.kept_bytes - less.kept_bytes, 1.0)


def _splits(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yields the ways to write `total` as `parts` positive numbers in order."""
    for cuts in itertools.combinations(range(1, total), parts - 1):
        bounds = (0, *cuts, total)
        yield tuple(b - a for a, b in itertools.pairwise(bounds))


def _is_run(kind: Kind, count: int, num_blocks: int) -> bool:
    """Whether a stage is worth a thought: a loop of one trip is no loop once compiled.

    Recomputation is not kept apart then. Without any, a TPU v5e held 0.7 to 0.9 GiB for the one
    block of 28 whose residuals are 0.33 GiB, so it is for small stacks, where one block is much.
    """
    return count > 1 or (kind.schedule == "none" and num_blocks <= _FEW_BLOCKS)


def _scheduled(mixed, runs, forward: Forward, num_blocks: int, link) -> Iterator[Draft]:
    """Yields plans with a schedule of the executor before a run of kept blocks."""
    plain = [kind for kind in mixed if not kind.policies]
    for count in range(2, num_blocks):
        for piece in schedules(plain, forward, count, link):
            for kind in mixed:
                if _is_run(kind, num_blocks - count, num_blocks):
                    yield draft([piece, runs[kind, num_blocks - count]])
