"""Across blocks: every plan worth a thought, with what it keeps, holds and costs.

Two kinds of stages are put together:

- runs of blocks under `none` or `full` with policies (`kinds.Kind`). In a plan the stage that
  holds most while it is reversed stands first and the one that keeps most last: a stage's
  residuals are freed before the stages in front of it are reversed, and swapping two neighbors out
  of that order never lowers the peak. At most three kinds are mixed: of equal blocks under one
  budget two would do, were blocks divisible.
- schedules of the executor (`uniform`, `sqrt`, `log`, `binomial`), alone or before a run of kept
  blocks; where the host may be used, with their carries there, too.

A stage of a plan with its figures: a run of blocks, or a schedule of the executor.

Where a plan may use the host, schedules may have their carries there: then those weigh nothing on
the device but for the few on their way, and each pass of the stage takes as long as its work or the
link, whichever is longer. Figures are of the stacks alone; `peak_model.py` says what the rest of
the step adds.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from jaxckpt.planner.kinds import Forward, Kind
from jaxckpt.plans import Plan, Policy, Stage, words
from jaxckpt.plans.plan_set import PlanSet
from jaxckpt.schedules.binomial import binomial_extra_forwards
from jaxckpt.schedules.of_stage import HANDED_OVER, log_slots
from jaxckpt.schedules.segments import segment_sizes, two_level
from jaxckpt.targets.links import HostLink

# Carries of a schedule that are on the device though its slots are on the host: one that blocks
# run forward from, and one on its way. A v5e's and an H100's compilers need no more.
_IN_FLIGHT = 2
_TO_HOST = Policy(kind="offload", names=(words.CARRY,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """One stage with a count: what a `Kind` says of a block, of all its blocks together.

    Attributes:
      stage: Bound.
      kept_bytes: On the device until the stage is reversed.
      largest_bytes: The largest array of that, of one stack.
      host_bytes: On the host until then.
      live_bytes: What reversing it holds besides.
      seconds: Forward, recomputation and backward.
      flops: Of the same.
    """

    stage: Stage
    kept_bytes: float
    largest_bytes: float
    host_bytes: float = 0.0
    live_bytes: float
    seconds: float
    flops: float


def run_of(kind: Kind, count: int) -> Piece:
    """Returns `count` blocks of a kind.

    A loop copies what it reads of its kept values, block by block; one block is no loop.
    """
    is_copied = count > 1 or kind.schedule != "none"
    return Piece(
        stage=kind.stage(count),
        kept_bytes=count * kind.kept_bytes,
        largest_bytes=count * kind.largest_bytes,
        host_bytes=count * kind.host_bytes,
        live_bytes=kind.live_bytes if is_copied else 0.0,
        seconds=count * kind.seconds,
        flops=count * kind.flops,
    )


def schedules(
    kinds: Sequence[Kind], forward: Forward, count: int, link: HostLink | None = None
) -> Iterator[Piece]:
    """Yields the executor's stages of `count` blocks.

    Args:
      kinds: `none` and `full` among them.
      forward: The cost of one more forward run of a block.
      count: Blocks of the stage.
      link: Of a device to the host; None where nothing may be there.
    """
    none = next(kind for kind in kinds if kind.schedule == "none")
    full = next(kind for kind in kinds if kind.schedule == "full" and not kind.policies)
    make = functools.partial(_scheduled, full, forward, count, link)
    singles: list[tuple[str, int | None, int, int]] = [
        ("binomial", slots, slots, binomial_extra_forwards(count, slots))
        for slots in range(1, count)
    ]
    # No schedule keeps more than the inputs of all blocks but the last.
    slots, two = min(log_slots(count), max(count - 1, 1)), two_level(count)
    singles.append(("log", None, slots, binomial_extra_forwards(count, slots)))
    singles.append(("sqrt", None, two.peak_slots, two.extra_forwards))
    recorded = dataclasses.replace(none, live_bytes=none.kept_bytes)  # one block at a time
    for schedule, argument, slots, extra in singles:
        # Each block's reversal loads what it starts from.
        counts = {"slots": slots + HANDED_OVER, "loaded": count, "again": extra + HANDED_OVER}
        yield from make(recorded, schedule, argument, **counts)
    for segments in range(2, count):
        sizes = segment_sizes(count, segments)
        counts = {"slots": segments, "loaded": segments, "again": count - sizes[-1]}
        for kind in kinds:
            if kind is not full and not any(p.kind == "offload" for p in kind.policies):
                yield from make(kind, "uniform", segments, **counts, kept=max(sizes))


def _scheduled(
    full: Kind,
    forward: Forward,
    count: int,
    link: HostLink | None,
    kind: Kind,
    schedule: str,
    argument: int | None,
    *,
    slots: int,
    loaded: int,
    again: int,
    kept: int = 0,
) -> Iterator[Piece]:
    """Yields a schedule whose blocks are recorded as a kind; with a link on the host, too.

    Args:
      full: The kind that keeps a block's input alone.
      forward: The cost of one more forward run of a block.
      count: Blocks of the stage.
      link: As of `schedules`.
      kind: How blocks are recorded.
      schedule: Its word.
      argument: Its number.
      slots: Carries that it keeps, all of which go out in the forward pass.
      loaded: Carries that come back in the backward pass. Those that go out again then are
        fewer, and go the other way.
      again: Blocks that are run forward once more.
      kept: Blocks that are recorded at once, beside the one that is reversed.
    """
    carry_bytes, rows_bytes = full.kept_bytes, kept * kind.largest_bytes
    piece = Piece(
        stage=Stage(count=count, schedule=schedule, argument=argument, policies=kind.policies),
        kept_bytes=slots * carry_bytes + kept * kind.kept_bytes,
        largest_bytes=max(slots * full.largest_bytes, rows_bytes),
        live_bytes=kind.live_bytes,
        seconds=count * kind.seconds + again * forward.seconds,
        flops=count * kind.flops + again * forward.flops,
    )
    yield piece
    if link is None:
        return
    first = count * forward.seconds
    passes = (first, slots), (piece.seconds - first, loaded)
    yield dataclasses.replace(
        piece,
        stage=dataclasses.replace(piece.stage, policies=(*piece.stage.policies, _TO_HOST)),
        kept_bytes=piece.kept_bytes - slots * carry_bytes,
        largest_bytes=rows_bytes,
        host_bytes=slots * carry_bytes,
        live_bytes=piece.live_bytes + _IN_FLIGHT * carry_bytes,
        seconds=sum(link.seconds(work, moved * carry_bytes) for work, moved in passes),
    )


_FEW_BLOCKS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A plan with its figures: of the stacks alone, and then of the whole step.

    Attributes:
      stages: Bound; where several stacks have a plan each, all of theirs.
      by_name: The stacks' plans in the order in which they run, where they have names.
      kept_bytes: All that is kept when the last block has run.
      worst_bytes: The most that is kept and held while a stage is reversed.
      largest_bytes: The largest array that is kept, of one stack.
      host_bytes: On the host.
      seconds: Forward, recomputation and backward.
      flops: Of the same.
      predicted_bytes: The peak of the whole step; 0 while the figures are of the stacks alone.
    """

    stages: tuple[Stage, ...]
    by_name: tuple[tuple[str, "Draft"], ...] = ()
    kept_bytes: float
    worst_bytes: float
    largest_bytes: float = 0.0
    host_bytes: float
    seconds: float
    flops: float
    predicted_bytes: int = 0

    @property
    def plan(self) -> Plan | PlanSet:
        """The plan, its last count left out where it is the only one; or plans by name."""
        if self.by_name:
            plans: Any = {name: one.plan for name, one in self.by_name}
            return PlanSet(plans)
        if len(self.stages) == 1:
            return Plan(stages=(dataclasses.replace(self.stages[0], count=None),))
        return Plan(stages=self.stages)

    @property
    def is_mixed(self) -> bool:
        """Whether blocks are treated differently."""
        return len(self.stages) > 1

    @property
    def family(self) -> tuple:
        """Plans of one family are compiled alike, so one's error tells of another's."""
        if self.by_name:
            return tuple(one.family for _, one in self.by_name)
        is_loop = all(stage.schedule in ("none", "full") for stage in self.stages)
        policies = [policy for stage in self.stages for policy in stage.policies]
        is_moving = any(policy.kind == "offload" for policy in policies)
        return self.is_mixed, is_loop, bool(policies), is_moving


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
        largest_bytes=max(piece.largest_bytes for piece in pieces),
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
      link: As for `schedules`.
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
    yield from _before_runs(here, runs, forward, num_blocks, link)


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


def _before_runs(mixed, runs, forward: Forward, num_blocks: int, link) -> Iterator[Draft]:
    """Yields plans with a schedule of the executor before a run of kept blocks."""
    plain = [kind for kind in mixed if not kind.policies]
    for count in range(2, num_blocks):
        for piece in schedules(plain, forward, count, link):
            for kind in mixed:
                if _is_run(kind, num_blocks - count, num_blocks):
                    yield draft([piece, runs[kind, num_blocks - count]])
