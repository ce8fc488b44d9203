"""Plans across blocks: every draft of one stack, with its kept bytes, peak bytes and seconds.

A draft is made of two sorts of stages:

- Runs of blocks of one kind (`kinds.Kind`). The stage whose reversal holds the most bytes comes
  first. The stage that keeps the most bytes comes last, because its residuals are freed before
  earlier stages are reversed. Swapping two neighboring stages never lowers the peak. At most three
  kinds are mixed; two would be enough if blocks were divisible.
- Schedules of the executor (`uniform`, `sqrt`, `log`, `binomial`), alone or before a run of kept
  blocks. Their carries are on the device, or on the host if a plan may use the host.

Carries on the host take no device memory, except for the few carries in transfer. Each pass of such
a stage takes as long as its work or its transfers, whichever is longer. All figures are of the
stacks alone; `peak_model.py` adds the rest of the step.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from jaxckpt.planner.kinds import Forward, Kind
from jaxckpt.planner.result import Row
from jaxckpt.plans import Plan, Policy, Stage, words
from jaxckpt.plans.plan_set import PlanSet
from jaxckpt.schedules.binomial import binomial_extra_forwards
from jaxckpt.schedules.of_stage import HANDED_OVER, log_slots
from jaxckpt.schedules.segments import segment_sizes, two_level
from jaxckpt.targets.links import HostLink

# A schedule whose slots are on the host has two carries on the device: the carry that blocks run
# forward from, and a carry in transfer. The compilers for v5e and H100 need no more.
_IN_FLIGHT = 2
_TO_HOST = Policy(kind="offload", names=(words.CARRY,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """One bound stage with the figures of all its blocks together.

    Attributes:
      stage: The bound stage.
      kept_bytes: Bytes that the stage keeps on the device until it is reversed.
      largest_bytes: Bytes of the largest kept array of one stack.
      host_bytes: Bytes that the stage keeps on the host until it is reversed.
      live_bytes: Bytes that the stage's reversal holds in addition to `kept_bytes`.
      seconds: Seconds of the forward pass, recomputation and the backward pass.
      flops: FLOPs of the forward pass, recomputation and the backward pass.
    """

    stage: Stage
    kept_bytes: float
    largest_bytes: float
    host_bytes: float = 0.0
    live_bytes: float
    seconds: float
    flops: float


def run_of(kind: Kind, count: int) -> Piece:
    """Returns the stage of `count` blocks of a kind.

    A loop copies a block's kept values when it reads them. A single block runs without a loop, so
    nothing is copied.
    """
    is_copied = count > 1 or kind.schedule != "none"
    return Piece(
        stage=kind.stage(count),
        kept_bytes=count * kind.kept_bytes,
        largest_bytes=count * kind.largest_bytes,
        host_bytes=count * kind.host_bytes,
        live_bytes=kind.live_bytes if is_copied else kind.gathered_bytes,
        seconds=count * kind.seconds,
        flops=count * kind.flops,
    )


def schedules(
    kinds: Sequence[Kind], forward: Forward, count: int, link: HostLink | None = None
) -> Iterator[Piece]:
    """Yields the stages of `count` blocks under each schedule of the executor.

    Args:
      kinds: Kinds by which blocks are recorded, including `none` and `full`.
      forward: The cost of one forward run of a block.
      count: The number of blocks.
      link: A device's link to the host; None if plans may not use the host.
    """
    none = next(kind for kind in kinds if kind.schedule == "none")
    full = next(kind for kind in kinds if kind.schedule == "full" and not kind.policies)
    make = functools.partial(_scheduled, full, forward, count, link)
    singles: list[tuple[str, int | None, int, int]] = [
        ("binomial", slots, slots, binomial_extra_forwards(count, slots))
        for slots in range(1, count)
    ]
    # No schedule keeps more carries than the inputs of all blocks except the last.
    slots, two = min(log_slots(count), max(count - 1, 1)), two_level(count)
    singles.append(("log", None, slots, binomial_extra_forwards(count, slots)))
    singles.append(("sqrt", None, two.peak_slots, two.extra_forwards))
    recorded = dataclasses.replace(none, live_bytes=none.kept_bytes)  # one block at a time
    for schedule, argument, slots, extra in singles:
        # The reversal of every block loads one carry.
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
    """Yields a stage under a schedule; with a link, also the same stage with carries on the host.

    Args:
      full: The kind `full`, which keeps only a block's input.
      forward: The cost of one forward run of a block.
      count: The number of blocks.
      link: A device's link to the host; None if plans may not use the host.
      kind: The kind by which blocks are recorded.
      schedule: The word of the schedule.
      argument: The number after the schedule's word; None for a schedule without a number.
      slots: Carries that the schedule keeps at once. The forward pass stores all of them.
      loaded: Carries loaded in the backward pass. The backward pass stores fewer carries, and the
        link moves both directions at once, so its stores are not counted.
      again: The number of block recomputations.
      kept: Blocks whose residuals are kept at once, in addition to the block that is reversed.
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
    """A plan with its figures, at first of the stacks alone, then of the whole step.

    Attributes:
      stages: The bound stages; for plans by name, the stages of all plans.
      by_name: Pairs of a name and a draft, in the order in which the stacks run; empty for one plan
        without a name.
      kept_bytes: Bytes kept on the device when the last block has run.
      worst_bytes: The most bytes that the device holds while a stage is reversed.
      largest_bytes: Bytes of the largest kept array of one stack.
      host_bytes: Bytes kept on the host.
      seconds: Seconds of the forward pass, recomputation and the backward pass.
      flops: FLOPs of the forward pass, recomputation and the backward pass.
      predicted_bytes: The peak of the whole step; 0 while figures are of the stacks alone.
      doubt: The share by which the prediction may be too high. It counts until a plan of this
        draft's family is compiled.
      graph: The digests of the function that the stages are segments of; empty for stages of
        blocks.
      rows: What each stage of a graph's plan keeps and recomputes.
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
    doubt: float = 0.02
    graph: str = ""
    rows: tuple[Row, ...] = ()

    @property
    def plan(self) -> Plan | PlanSet:
        """The plan, or the plans by name; a plan of one stage has no count."""
        if self.by_name:
            plans: Any = {name: one.plan for name, one in self.by_name}
            return PlanSet(plans)
        if self.graph:
            return Plan(stages=self.stages, graph=self.graph)
        if len(self.stages) == 1:
            return Plan(stages=(dataclasses.replace(self.stages[0], count=None),))
        return Plan(stages=self.stages)

    @property
    def is_mixed(self) -> bool:
        """Whether the draft has several stages, or several segments of a function."""
        return len(self.stages) > 1 or bool(self.graph)

    @property
    def family(self) -> tuple:
        """A key that is equal for drafts whose predictions have similar errors."""
        if self.by_name:
            return tuple(one.family for _, one in self.by_name)
        is_loop = all(stage.schedule in ("none", "full") for stage in self.stages)
        policies = [policy for stage in self.stages for policy in stage.policies]
        is_moving = any(policy.kind == "offload" for policy in policies)
        return self.is_mixed, is_loop, bool(policies), is_moving, bool(self.graph)


def draft(pieces: Sequence[Piece]) -> Draft:
    """Returns the draft of the given stages, in their order."""
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
    """Yields the drafts of one stack.

    Args:
      kinds: The kinds to mix, including `none` and `full`.
      forward: The cost of one forward run of a block.
      num_blocks: The number of blocks, L.
      link: A device's link to the host; None if plans may not use the host.
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
    """Returns the kinds that no mix of two other kinds beats in bytes and seconds, in given order.

    The result always contains `none` and `full`.
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
    """Whether a run of blocks is worth a draft.

    XLA unrolls the loop of a single block, and may then merge recomputation with the forward pass.
    Under `none` a TPU v5e held 0.7 to 0.9 GiB for one block of 28 whose residuals are 0.33 GiB. So
    a single block is worth a draft only under `none`, in a stack of few blocks.
    """
    return count > 1 or (kind.schedule == "none" and num_blocks <= _FEW_BLOCKS)


def _before_runs(mixed, runs, forward: Forward, num_blocks: int, link) -> Iterator[Draft]:
    """Yields drafts with a schedule of the executor before a run of kept blocks."""
    plain = [kind for kind in mixed if not kind.policies]
    for count in range(2, num_blocks):
        for piece in schedules(plain, forward, count, link):
            for kind in mixed:
                if _is_run(kind, num_blocks - count, num_blocks):
                    yield draft([piece, runs[kind, num_blocks - count]])
