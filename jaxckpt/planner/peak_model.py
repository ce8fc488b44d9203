"""The peak of a whole step, from the peaks of three compiled ones.

    peak = offset + the most that is kept and held while a stage is reversed

`offset` is what weights, optimizer, gradients and the loss add; the compiled peak of `full` tells
it. What blocks keep is what JAX keeps. What the reversal of one holds besides is all its residuals,
of which those that were kept are read where they are but for a share; the compiled peak of `none`
tells the share (XLA fuses most of the reads). Plans of several stages slice the parameters and join
their gradients, which costs or saves a backend's own amount; a plan of two stages tells it.

Several stacks under one plan are reversed one after another. Each is taken for an equal share of
all: while the last one is reversed, all that the others keep is there, and their gradients are not.

On a TPU v5e, 28 blocks of Qwen3-0.6B's width, this is within 0.1 % for plans of one stage and of
two, whatever the split.

A step on several devices: what each keeps of a stack, and what a block run again sends.

Blocks are traced as if one device ran them. How many devices share what is kept, and what they
send, is the partitioner's choice; the compiled peaks and collectives of `none` and `full` tell it.
"""

import dataclasses
import math

from jaxckpt.compiled.report import MemoryReport
from jaxckpt.planner.across_blocks import Draft, draft, run_of
from jaxckpt.planner.kinds import Forward, Kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeakModel:
    """Predicts peaks; see this module's text.

    Attributes:
      none: The kind `none` as it is once compiled.
      carry_bytes: What `full` keeps of a block.
      fused_share: Of what is kept beyond that, what its reversal does not copy.
      offset_bytes: Beside what the stacks keep and hold.
      stages_bytes: Added for a plan of several stages; may be negative.
      turns: Stacks that are reversed one after another.
      params_bytes: Of all stacks.
    """

    none: Kind
    carry_bytes: float
    fused_share: float
    offset_bytes: float
    stages_bytes: float = 0.0
    turns: int = 1
    params_bytes: float = 0.0

    @classmethod
    def between(
        cls,
        full: Kind,
        full_peak: int,
        none: Kind,
        none_peak: int,
        num_blocks: int,
        turns: int = 1,
    ) -> "PeakModel":
        """Returns the model that is exact for two compiled plans.

        Args:
          full: `full` as traced.
          full_peak: Its compiled peak.
          none: `none` as traced.
          none_peak: Its compiled peak.
          num_blocks: L.
          turns: Stacks that run under the plan.
        """
        params = num_blocks * full.params_bytes
        offset = full_peak - _worst(draft([run_of(full, num_blocks)]), turns, params)
        # All that is kept is there in the first turn, but for gradients of later ones.
        most = none_peak - offset + (turns - 1) / turns * params
        held = turns * (most - num_blocks * none.kept_bytes)
        extra = max(none.kept_bytes - full.kept_bytes, 1.0)
        kept = none.kept_bytes
        if held < 0 or num_blocks == 1:  # XLA drops some of what JAX keeps
            kept, held = max(most / num_blocks, full.kept_bytes), 0.0
        return cls(
            none=dataclasses.replace(none, kept_bytes=kept, live_bytes=held),
            carry_bytes=full.kept_bytes,
            fused_share=(none.live_bytes - held) / extra,
            offset_bytes=offset,
            turns=turns,
            params_bytes=params,
        )

    def compiled(self, kind: Kind) -> Kind:
        """Returns a traced kind as it is once compiled."""
        if kind.schedule == self.none.schedule:
            sizes = {"kept_bytes": self.none.kept_bytes, "live_bytes": self.none.live_bytes}
            return dataclasses.replace(kind, **sizes)
        read = self.fused_share * (kind.kept_bytes - self.carry_bytes)
        return dataclasses.replace(kind, live_bytes=max(kind.live_bytes - max(read, 0.0), 0.0))

    def with_stages(self, one: Draft, peak: int) -> "PeakModel":
        """Returns the model that is exact for a compiled plan of several stages, too."""
        extra = peak - self.offset_bytes - _worst(one, self.turns, self.params_bytes)
        return dataclasses.replace(self, stages_bytes=extra)

    def predict(self, one: Draft) -> int:
        """Returns the predicted peak of a plan."""
        extra = self.stages_bytes if len(one.stages) > 1 else 0.0
        worst = _worst(one, self.turns, self.params_bytes)
        return int(self.offset_bytes + worst + extra)


def _worst(one: Draft, turns: int, params_bytes: float) -> float:
    """Returns the most that equal stacks hold together while one of them is reversed."""
    others = (turns - 1) / turns * (one.kept_bytes - params_bytes)
    return one.worst_bytes / turns + max(others, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """What a step's devices share.

    Attributes:
      num_devices: Devices of the step, which share the parameters.
      parts: How many of them share what a stack keeps: a divisor of `num_devices`.
      sent_seconds: Of a step that runs no block again.
      again_seconds_per_flop: What running a block again adds to that, by its FLOPs: its parameters
        are gathered once more.
    """

    num_devices: int = 1
    parts: int = 1
    sent_seconds: float = 0.0
    again_seconds_per_flop: float = 0.0

    @classmethod
    def of(
        cls, traced_bytes: float, again_flops: float, full: MemoryReport, none: MemoryReport
    ) -> "Spread":
        """Returns what two compiled plans tell.

        Args:
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
            parts=parts,
            sent_seconds=sent[0],
            again_seconds_per_flop=again / again_flops if again_flops else 0.0,
        )

    def kind(self, kind: Kind, none: Kind) -> Kind:
        """Returns a kind as one device sees it.

        Args:
          kind: As traced.
          none: The kind `none` of the same block, as traced.
        """
        return dataclasses.replace(
            kind,
            kept_bytes=kind.kept_bytes / self.parts,
            host_bytes=kind.host_bytes / self.parts,
            live_bytes=kind.live_bytes / self.parts,
            params_bytes=kind.params_bytes / self.num_devices,
            seconds=kind.seconds + (kind.flops - none.flops) * self.again_seconds_per_flop,
        )

    def forward(self, forward: Forward) -> Forward:
        """Returns the cost of one more run of a block, with what it sends."""
        sent = forward.flops * self.again_seconds_per_flop
        return dataclasses.replace(forward, seconds=forward.seconds + sent)
