"""The peak of a whole step, from the peaks of a few compiled ones.

    peak = offset + the most that is kept and held while a stage is reversed

`offset` is what weights, optimizer, gradients and the loss add; the compiled peak of `full` tells
it. What blocks keep is what JAX keeps. What the reversal of one holds besides is all its residuals,
of which those that were kept are read where they are but for a share; the compiled peak of `none`
tells the share (XLA fuses most of the reads), one for all stacks. Plans of several stages slice the
parameters and join their gradients, which costs or saves a backend's own amount; of one stack a
plan of two stages tells it.

On a TPU v5e, 28 blocks of Qwen3-0.6B's width, this is within 0.1 % for plans of one stage and of
two, whatever the split.

A step on several devices: what each keeps of a stack, and what a block run again sends.

Blocks are traced as if one device ran them. How many devices share what is kept, and what they
send, is the partitioner's choice. What it does with the carries is read from the arrays that the
compiled `full` holds; the compiled peaks and collectives of `none` and `full` tell the rest.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

from jaxckpt.compiled.report import MemoryReport
from jaxckpt.planner.across_blocks import Draft, run_of
from jaxckpt.planner.across_stacks import Part, join
from jaxckpt.planner.kinds import Forward, Kind
from jaxckpt.planner.stacks import Stack

_BISECTIONS = 120
_SAME = 1e-3  # peaks that differ by less are equal to the model
_MOST_SHARE = 2.0**40  # of what JAX keeps of one block; a compiler may hold anything


def all_under(parts: Sequence[Part], schedule: str) -> Draft:
    """Returns the plan of all parts that treats every block as `none` or `full`."""
    run = lambda part: run_of(part.kind(schedule), part.num_blocks)
    return join(parts, [part.draft(run(part)) for part in parts])


def as_compiled(parts: Sequence[Part], worst_bytes: float) -> tuple[Part, ...]:
    """Returns the parts once compiled: under `none`, all of them together hold `worst_bytes`.

    Many shares give `worst_bytes` where the peak of `none` is not inside a reversal. XLA is then
    taken to keep what JAX keeps.
    """
    worst = lambda share: all_under([_compiled(part, share) for part in parts], "none").worst_bytes
    is_plain = math.isclose(worst(1.0), worst_bytes, rel_tol=_SAME)
    low, high = (1.0, 1.0) if is_plain else (0.0, _MOST_SHARE)
    for _ in range(_BISECTIONS):
        share = (low + high) / 2
        low, high = (low, share) if worst(share) > worst_bytes else (share, high)
    return tuple(_compiled(part, high) for part in parts)


def _compiled(part: Part, share: float) -> Part:
    """Returns a part whose `none` keeps a share of what JAX keeps.

    XLA drops some of it where that is less than all, but never a block's input. What is more than
    all is held while a block is reversed, unless there is only one: then it is kept. Other kinds
    hold as much less or more as they keep beside the input.
    """
    none, full = part.kind("none"), part.kind("full")
    kept_share = share if part.num_blocks == 1 else min(share, 1.0)
    kept = max(kept_share * none.kept_bytes, full.kept_bytes)
    held = (share - kept_share) * max(none.kept_bytes, 1.0)
    fused_share = (none.live_bytes - held) / max(none.kept_bytes - full.kept_bytes, 1.0)

    def change(kind: Kind) -> Kind:
        if kind.schedule == "none":
            return dataclasses.replace(kind, kept_bytes=kept, live_bytes=held)
        read = fused_share * (kind.kept_bytes - full.kept_bytes)
        return dataclasses.replace(kind, live_bytes=max(kind.live_bytes - read, 0.0))

    return part.changed(change)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """What a step's devices share.

    Attributes:
      num_devices: Devices of the step, which share the parameters.
      carry_parts: How many of them share a block's input.
      parts: How many of them share what a stack keeps beside: a divisor of `num_devices`.
      sent_seconds: Of a step that runs no block again.
      again_seconds_per_flop: What running a block again adds to that, by its FLOPs: its parameters
        are gathered once more.
    """

    num_devices: int = 1
    carry_parts: float = 1
    parts: int = 1
    sent_seconds: float = 0.0
    again_seconds_per_flop: float = 0.0

    @classmethod
    def of(
        cls,
        stacks: Iterable[Stack],
        traced_bytes: float,
        again_flops: float,
        full: MemoryReport,
        none: MemoryReport,
    ) -> "Spread":
        """Returns what two compiled plans tell.

        Args:
          stacks: All that follow a plan.
          traced_bytes: What all stacks under `none` hold more than under `full`, as traced.
          again_flops: What a step under `full` runs again, of all stacks.
          full: Of the compiled step whose blocks are all `full`.
          none: Of the one whose blocks are all `none`.
        """
        if full.num_devices == 1:
            return cls()
        ratio = traced_bytes / max(none.peak_bytes - full.peak_bytes, 1)
        sizes = [n for n in range(1, full.num_devices + 1) if full.num_devices % n == 0]
        parts = min(sizes, key=lambda n: abs(math.log(max(ratio, 1e-9) / n)))
        # A step that was refused for its size does not tell: it is taken to send what the other
        # does, and nothing where neither tells.
        told = [report.collective_seconds for report in (none, full)]
        sent = [one if one is not None else next(filter(None, told), 0.0) for one in told]
        again = max(sent[1] - sent[0], 0.0)
        return cls(
            num_devices=full.num_devices,
            carry_parts=_carry_parts(stacks, full) or parts,
            parts=parts,
            sent_seconds=sent[0],
            again_seconds_per_flop=again / again_flops if again_flops else 0.0,
        )

    def kind(self, kind: Kind, none: Kind, full: Kind) -> Kind:
        """Returns a kind as one device sees it.

        Args:
          kind: As traced.
          none: The kind `none` of the same block, as traced.
          full: The kind `full`, which keeps a block's input alone.
        """
        carry = full.kept_bytes
        share = lambda size: min(size, carry) / self.carry_parts + max(size - carry, 0) / self.parts
        return dataclasses.replace(
            kind,
            kept_bytes=share(kind.kept_bytes),
            host_bytes=kind.host_bytes / self.parts,
            live_bytes=share(kind.live_bytes),
            largest_bytes=share(kind.largest_bytes),
            params_bytes=kind.params_bytes / self.num_devices,
            seconds=kind.seconds + (kind.flops - none.flops) * self.again_seconds_per_flop,
        )

    def forward(self, forward: Forward) -> Forward:
        """Returns the cost of one more run of a block, with what it sends."""
        sent = forward.flops * self.again_seconds_per_flop
        return dataclasses.replace(forward, seconds=forward.seconds + sent)


def _carry_parts(stacks: Iterable[Stack], full: MemoryReport) -> float | None:
    """Returns how many devices share the carries of stacks, from the arrays that `full` holds.

    None where no array can be told to be the carries of all blocks.
    """
    dims = (re.findall(r"\d+", buffer.shape.partition("[")[2]) for buffer in full.buffers)
    held = [tuple(map(int, own)) for own in dims]
    whole = parted = 0.0
    for stack in stacks:
        for leaf in stack.carry:
            shape = (stack.num_blocks, *leaf.shape)
            shares = [
                1 / parts for own in held if (parts := _parts_of(shape, own, full.num_devices))
            ]
            if shares:
                size = math.prod(shape) * leaf.dtype.itemsize
                whole, parted = whole + size, parted + size * sum(shares) / len(shares)
    return whole / parted if parted else None


def _parts_of(shape: tuple[int, ...], own: tuple[int, ...], num_devices: int) -> int:
    """Returns how many devices share an array of blocks, from what one has of it; 0 if not it."""
    if len(shape) != len(own) or shape[0] != own[0] or 0 in own:
        return 0
    if any(all_of % one for all_of, one in zip(shape, own, strict=True)):
        return 0
    parts = math.prod(shape) // math.prod(own)
    return parts if num_devices % parts == 0 else 0
