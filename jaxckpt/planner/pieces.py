"""A stage of a plan with its figures: a run of blocks, or a schedule of the executor.

Where a plan may use the host, schedules may have their carries there: then those weigh nothing on
the device but for the few on their way, and each pass of the stage takes as long as its work or the
link, whichever is longer. Figures are of the stacks alone; `peak.py` says what the rest of the step
adds.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from jaxckpt.memory.host_link import HostLink
from jaxckpt.planner.costs import Forward, Kind
from jaxckpt.plans import Policy, Stage, words
from jaxckpt.plans.binomial import binomial_extra_forwards
from jaxckpt.plans.stage_schedule import HANDED_OVER, log_slots
from jaxckpt.plans.two_level import two_level
from jaxckpt.plans.uniform import segment_sizes

# Carries of a schedule that are on the device though its slots are on the host: one that blocks
# run forward from, and one on its way. A v5e's and an H100's compilers need no more.
_IN_FLIGHT = 2
_TO_HOST = Policy(kind="offload", names=(words.CARRY,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """One stage with a count: what `costs.Kind` says of a block, of all its blocks together.

    Attributes:
      stage: Bound.
      kept_bytes: On the device until the stage is reversed.
      host_bytes: On the host until then.
      live_bytes: What reversing it holds besides.
      seconds: Forward, recomputation and backward.
      flops: Of the same.
    """

    stage: Stage
    kept_bytes: float
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
    make = _Scheduled(none=none, carry_bytes=full.kept_bytes, forward=forward, count=count)
    singles: list[tuple[str, int | None, int, int]] = [
        ("binomial", slots, slots, binomial_extra_forwards(count, slots))
        for slots in range(1, count)
    ]
    slots, two = min(log_slots(count), count), two_level(count)
    singles.append(("log", None, slots, binomial_extra_forwards(count, slots)))
    singles.append(("sqrt", None, two.peak_slots, two.extra_forwards))
    for schedule, argument, slots, extra in singles:
        slots, forwards = slots + HANDED_OVER, extra + HANDED_OVER
        yield (piece := make.single(schedule, argument, slots, forwards))
        if link is not None:
            # Each block's reversal loads what it starts from.
            yield make.on_host(piece, stored=slots, loaded=count, link=link)
    for segments in range(2, count):
        for kind in kinds:
            if kind is not full and not any(p.kind == "offload" for p in kind.policies):
                yield (piece := make.uniform(segments, kind))
                if link is not None:
                    yield make.on_host(piece, stored=segments, loaded=segments, link=link)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scheduled:
    """Makes the executor's pieces of one count."""

    none: Kind
    carry_bytes: float
    forward: Forward
    count: int

    def single(self, schedule: str, argument: int | None, slots: int, forwards: int) -> Piece:
        """Returns a schedule that records one block at a time, under a loss."""
        return self._piece(
            Stage(count=self.count, schedule=schedule, argument=argument),
            kept_bytes=slots * self.carry_bytes,
            live_bytes=self.none.kept_bytes,
            forwards=forwards,
            kind=self.none,
        )

    def uniform(self, segments: int, kind: Kind) -> Piece:
        """Returns segments of which one at a time is recorded as `kind` says."""
        sizes = segment_sizes(self.count, segments)
        stage = Stage(
            count=self.count, schedule="uniform", argument=segments, policies=kind.policies
        )
        return self._piece(
            stage,
            kept_bytes=segments * self.carry_bytes + max(sizes) * kind.kept_bytes,
            live_bytes=kind.live_bytes,
            forwards=self.count - sizes[-1],
            kind=kind,
        )

    def on_host(self, piece: Piece, *, stored: int, loaded: int, link: HostLink) -> Piece:
        """Returns a schedule with its carries on the host.

        Args:
          piece: With its carries on the device.
          stored: Carries that it keeps, all of which go out in the forward pass.
          loaded: Carries that come back in the backward pass. Those that go out again then are
            fewer, and go the other way.
          link: Of a device to the host.
        """
        forward = self.count * self.forward.seconds
        passes = (forward, stored), (piece.seconds - forward, loaded)
        return dataclasses.replace(
            piece,
            stage=dataclasses.replace(piece.stage, policies=(*piece.stage.policies, _TO_HOST)),
            kept_bytes=piece.kept_bytes - stored * self.carry_bytes,
            host_bytes=stored * self.carry_bytes,
            live_bytes=piece.live_bytes + _IN_FLIGHT * self.carry_bytes,
            seconds=sum(link.seconds(work, moved * self.carry_bytes) for work, moved in passes),
        )

    def _piece(self, stage: Stage, *, kept_bytes, live_bytes, forwards: int, kind: Kind) -> Piece:
        return Piece(
            stage=stage,
            kept_bytes=kept_bytes,
            live_bytes=live_bytes,
            seconds=self.count * kind.seconds + forwards * self.forward.seconds,
            flops=self.count * kind.flops + forwards * self.forward.flops,
        )
