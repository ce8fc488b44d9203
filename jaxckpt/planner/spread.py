"""A step on several devices: what each keeps of a stack, and what a block run again sends.

Blocks are traced as if one device ran them. How many devices share what is kept, and what they
send, is the partitioner's choice; the compiled peaks and collectives of `none` and `full` tell it.
"""

import dataclasses
import math

from jaxckpt.memory.report import MemoryReport
from jaxckpt.planner.costs import Forward, Kind


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
