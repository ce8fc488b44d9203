"""Predicts the peak of a whole step under a plan from the peaks of a few compiled plans.

    peak = offset + the most bytes held while a stage is reversed

The compiled plans are called anchors. The peak of `full` gives `offset`: weights, optimizer,
gradients and the loss. The peak of `none` gives the share of kept residuals that XLA copies when a
block is reversed; XLA fuses most of the reads. All stacks have one share. If there is one part, a
plan of two stages gives `stages_bytes`: plans of several stages slice the parameters and join their
gradients, which costs or saves bytes. Blocks keep the bytes that JAX keeps.

On a TPU v5e, with 28 blocks of Qwen3-0.6B's width, the error is within 0.1 % for plans of one or
two stages, for every split.

Several devices (`Spread`): blocks are traced as if one device ran them. The partitioner chooses how
many devices share the kept values, and what the devices send. Its choices are read from the
arrays that compiled plans hold: carries from `full`, residuals from `none`, and what policies keep
from a third anchor, whose blocks keep most under policies. If no array is recognized, the peaks of
`none` and `full` tell. Their collectives tell what is sent. The peak of the third anchor also gives
what a reversal holds under its policies.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from jaxckpt.compiled.buffers import Buffer
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.planner.across_blocks import Draft, run_of
from jaxckpt.planner.across_stacks import Part, join
from jaxckpt.planner.kinds import Forward, Kind

_BISECTIONS = 120
_SAME = 1e-3  # peaks closer than this share are equal to the model
_MOST_SHARE = 2.0**40  # the largest share that is tried; a compiler may hold any number of bytes


def all_under(parts: Sequence[Part], schedule: str) -> Draft:
    """Returns the draft that treats every block of all parts by the kind `none` or `full`."""
    run = lambda part: run_of(part.kind(schedule), part.num_blocks)
    return join(parts, [part.draft(run(part)) for part in parts])


def all_keeping(parts: Sequence[Part]) -> Draft:
    """Returns the draft that treats every block by the kind whose policies keep most."""
    return join(parts, [part.draft(run_of(part.keeping, part.num_blocks)) for part in parts])


def as_compiled(
    parts: Sequence[Part], worst_bytes: float, *, is_spread: bool = False
) -> tuple[Part, ...]:
    """Returns the parts with one common share, fitted so that they hold `worst_bytes` under `none`.

    If the peak of `none` is not inside a reversal, many shares give `worst_bytes`. The share is
    then 1: the model assumes that XLA keeps the bytes that JAX keeps.

    Args:
      parts: The parts, with the bytes that JAX keeps.
      worst_bytes: The peak of `none` without the offset.
      is_spread: Whether several devices run the step together.
    """
    made = lambda share: tuple(_compiled(part, share, is_spread) for part in parts)
    worst = lambda share: all_under(made(share), "none").worst_bytes
    is_plain = math.isclose(worst(1.0), worst_bytes, rel_tol=_SAME)
    low, high = (1.0, 1.0) if is_plain else (0.0, _MOST_SHARE)
    for _ in range(_BISECTIONS):
        share = (low + high) / 2
        low, high = (low, share) if worst(share) > worst_bytes else (share, high)
    return made(high)


def _compiled(part: Part, share: float, is_spread: bool) -> Part:
    """Returns a part whose `none` keeps a share of the bytes that JAX keeps.

    A share below 1 means that XLA drops some residuals, but never a block's input. With a share
    above 1, the excess is held while a block is reversed; a stack of one block keeps the excess.
    The other kinds change in proportion to the bytes that they keep in addition to the input. On
    several devices an excess above what one block keeps is more than copies: a reversal gathers
    arrays from other devices. It gathers them under every kind; what `full` gathers is in the
    offset.
    """
    none, full = part.kind("none"), part.kind("full")
    kept_share = share if part.num_blocks == 1 else min(share, 1.0)
    kept = max(kept_share * none.kept_bytes, full.kept_bytes)
    held = (share - kept_share) * max(none.kept_bytes, 1.0)
    gathered = held if is_spread and held > none.kept_bytes else 0.0
    fused_share = (none.live_bytes - held) / max(none.kept_bytes - full.kept_bytes, 1.0)

    def change(kind: Kind) -> Kind:
        if kind.schedule == "none":
            own = {"live_bytes": held, "gathered_bytes": gathered}
            return dataclasses.replace(kind, kept_bytes=kept, **own)
        read = fused_share * (kind.kept_bytes - full.kept_bytes)
        least = gathered if kind.policies else 0.0
        return dataclasses.replace(kind, live_bytes=max(kind.live_bytes - read, least))

    return part.changed(change)


def functions_as_compiled(part: Part, full: MemoryReport, none: MemoryReport) -> tuple[Part, float]:
    """Returns the part of functions under one plan, fitted to two compiled peaks, and the offset.

    `full` recomputes a whole function and then holds the same bytes as `none`. So the two peaks do
    not determine the offset. The model takes the smallest possible offset: arguments, results, and
    the bytes that JAX's residuals cannot explain. XLA holds the rest of the peak for the function,
    and `held` bytes are scaled to it. XLA holds recomputed values behind a barrier as JAX names
    them, so their bytes are not scaled.

    Args:
      part: The functions.
      full: The report of the step whose functions are all `full`.
      none: The report of the step whose functions are all `none`.
    """
    before = part.draft(run_of(part.kind("none"), part.num_blocks)).worst_bytes
    inside = min(float(none.temp_bytes), max(part.share * part.most_bytes, before))
    scale, offset = inside / max(before, 1.0), none.peak_bytes - inside

    def change(kind: Kind) -> Kind:
        if kind.schedule == "none":
            return dataclasses.replace(kind, kept_bytes=scale * kind.kept_bytes)
        live = scale * kind.live_bytes
        if not kind.policies:
            live = max(full.peak_bytes - offset - kind.kept_bytes, 0.0)
        return dataclasses.replace(kind, live_bytes=live)

    return part.changed(change).with_graphs(scale), offset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """How a step's devices share its arrays, and the seconds of their communication.

    Attributes:
      num_devices: The number of devices. All devices share the parameters.
      carry_parts: The number of devices that share a block's input.
      parts: The number of devices that share the other residuals under `none`.
      policy_parts: The number of devices that share what policies keep besides a block's input.
      sent_seconds: Seconds of communication of a step that recomputes no block.
      again_seconds_per_flop: Seconds of communication per recomputed FLOP. Recomputation gathers
        the parameters a second time.
    """

    num_devices: int = 1
    carry_parts: float = 1
    parts: float = 1
    policy_parts: float = 1
    sent_seconds: float = 0.0
    again_seconds_per_flop: float = 0.0

    @classmethod
    def of(
        cls,
        parts: Sequence[Part],
        traced_bytes: float,
        again_flops: float,
        full: MemoryReport,
        none: MemoryReport,
        keeping: MemoryReport | None = None,
    ) -> "Spread":
        """Returns the spread that the reports of compiled plans show.

        Args:
          parts: The parts of the step, as traced.
          traced_bytes: The bytes that all stacks, as traced, hold under `none` minus under `full`.
          again_flops: The FLOPs that all stacks of a step recompute under `full`.
          full: The report of the step whose blocks are all `full`.
          none: The report of the step whose blocks are all `none`.
          keeping: The report of the step whose blocks all keep most under policies.
        """
        if full.num_devices == 1:
            return cls()
        ratio = traced_bytes / max(none.peak_bytes - full.peak_bytes, 1)
        sizes = [n for n in range(1, full.num_devices + 1) if full.num_devices % n == 0]
        likely = _nearest(sizes, ratio)
        kinds = lambda schedule: [part.kind(schedule) for part in parts]
        kept_parts = _parts_of_kept(kinds("none"), none, likely, full.buffers)
        policy_parts = kept_parts
        if keeping is not None:
            kept = [part.keeping for part in parts]
            policy_parts = _parts_of_kept(kept, keeping, kept_parts, full.buffers)
        # If the compiler refused a step for its size, the report has no collectives. The step then
        # counts as sending as much as the other step, or nothing if both steps were refused.
        told = [report.collective_seconds for report in (none, full)]
        sent = [one if one is not None else next(filter(None, told), 0.0) for one in told]
        again = max(sent[1] - sent[0], 0.0)
        return cls(
            num_devices=full.num_devices,
            carry_parts=_parts_of_kept(kinds("full"), full, kept_parts),
            parts=kept_parts,
            policy_parts=policy_parts,
            sent_seconds=sent[0],
            again_seconds_per_flop=again / again_flops if again_flops else 0.0,
        )

    def kind(self, kind: Kind, none: Kind, full: Kind) -> Kind:
        """Returns a kind with the figures of one device.

        Args:
          kind: A kind as traced.
          none: The kind `none` of the block, as traced.
          full: The kind `full` of the block, which keeps only a block's input.
        """
        carry, kept_parts = full.kept_bytes, self.policy_parts if kind.policies else self.parts

        def share(size: float, parts: float) -> float:
            return min(size, carry) / self.carry_parts + max(size - carry, 0) / parts

        return dataclasses.replace(
            kind,
            kept_bytes=share(kind.kept_bytes, kept_parts),
            host_bytes=kind.host_bytes / kept_parts,
            live_bytes=share(kind.live_bytes, self.parts),
            largest_bytes=share(kind.largest_bytes, kept_parts),
            params_bytes=kind.params_bytes / self.num_devices,
            seconds=kind.seconds + (kind.flops - none.flops) * self.again_seconds_per_flop,
        )

    def forward(self, forward: Forward) -> Forward:
        """Returns the cost of one forward run of a block, with its communication."""
        sent = forward.flops * self.again_seconds_per_flop
        return dataclasses.replace(forward, seconds=forward.seconds + sent)


def _nearest(numbers: Iterable[int], number: float) -> int:
    """Returns the number whose ratio to another number is nearest to 1."""
    return min(numbers, key=lambda n: abs(math.log(max(number, 1e-9) / n)))


def _parts_of_kept(
    kinds: Iterable[Kind], report: MemoryReport, likely: float, known: Sequence[Buffer] = ()
) -> float:
    """Returns how many devices share the kept arrays of all blocks, from the arrays of a report.

    Args:
      kinds: The kind of each part, as traced.
      report: The report of the step whose blocks are all of these kinds.
      likely: The result if no array has the shape of a part of a kept array. If an array may be a
        part of several kept arrays, the number of parts nearest to it counts.
      known: Arrays of another report, which are not counted.
    """
    shapes = set().union(*(kind.shapes for kind in kinds))
    left, whole, own_bytes = Counter(one.shape for one in known), 0.0, 0.0
    for buffer in report.buffers:
        own = tuple(map(int, re.findall(r"\d+", buffer.shape.partition("[")[2])))
        shares = [n for shape in shapes if (n := _parts_of(shape, own, report.num_devices))]
        left[buffer.shape] -= 1
        if shares and left[buffer.shape] < 0:
            whole += _nearest(shares, likely) * buffer.size_bytes
            own_bytes += buffer.size_bytes
    return whole / own_bytes if own_bytes else likely


def _parts_of(shape: tuple[int, ...], own: tuple[int, ...], num_devices: int) -> int:
    """Returns how many devices share an array of `shape` if each holds a part of shape `own`.

    The result is 0 if no equal parts of the array have the shape `own`.
    """
    if len(shape) != len(own) or shape[0] != own[0] or 0 in own:
        return 0
    if any(all_of % one for all_of, one in zip(shape, own, strict=True)):
        return 0
    parts = math.prod(shape) // math.prod(own)
    return parts if num_devices % parts == 0 else 0
