"""A step on several devices: what each keeps of a stack, and what a block run again sends.

Blocks are traced as if one device ran them. How many devices share what is kept, and what they
send, is the partitioner's choice; the compiled peaks and collectives of `none` and `full` tell it.
"""

import dataclasses
import math
from collections.abc import Sequence

from jaxckpt.memory.report import MemoryReport
from jaxckpt.planner.costs import Forward, Kind
from jaxckpt.planner.drafts import draft
from jaxckpt.planner.pieces import run_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """What a step's devices share.

    Attributes:
      num_devices: Devices of the step, which share the parameters.
      parts: How many of them share what a stack keeps: a divisor of `num_devices`.
      sent_seconds: Of a step that runs no block again.
      again_seconds: What one block run again adds to that: its parameters are gathered once more.
      none_flops: Of a block that is not run again.
      again_flops: What running it again adds.
    """

    num_devices: int = 1
    parts: int = 1
    sent_seconds: float = 0.0
    again_seconds: float = 0.0
    none_flops: float = 0.0
    again_flops: float = 0.0

    @classmethod
    def of(
        cls,
        plain: Sequence[Kind],
        full: MemoryReport,
        none: MemoryReport,
        num_blocks: int,
        runs: int,
    ) -> "Spread":
        """Returns what two compiled plans tell.

        Args:
          plain: Kinds as traced, `none` and `full` among them.
          full: Of the compiled step whose blocks are all `full`.
          none: Of the one whose blocks are all `none`.
          num_blocks: L.
          runs: How often a step runs its stacks.
        """
        if full.num_devices == 1:
            return cls()
        kinds = {kind.schedule: kind for kind in plain if not kind.policies}
        traced = [draft([run_of(kinds[name], num_blocks)]).worst_bytes for name in ("none", "full")]
        ratio = (traced[0] - traced[1]) / max(none.peak_bytes - full.peak_bytes, 1)
        sizes = [n for n in range(1, full.num_devices + 1) if full.num_devices % n == 0]
        parts = min(sizes, key=lambda n: abs(math.log(max(ratio, 1e-9) / n)))
        # A step that was refused for its size does not tell: it is taken to send what the other
        # does, and nothing where neither tells.
        told = [report.collective_seconds for report in (none, full)]
        sent = [one if one is not None else next(filter(None, told), 0.0) for one in told]
        return cls(
            num_devices=full.num_devices,
            parts=parts,
            sent_seconds=sent[0],
            again_seconds=max(sent[1] - sent[0], 0.0) / (num_blocks * runs),
            none_flops=kinds["none"].flops,
            again_flops=kinds["full"].flops - kinds["none"].flops,
        )

    def kind(self, kind: Kind) -> Kind:
        """Returns a kind as one device sees it."""
        if self.num_devices == 1:
            return kind
        again = (kind.flops - self.none_flops) / self.again_flops if self.again_flops else 0.0
        return dataclasses.replace(
            kind,
            kept_bytes=kind.kept_bytes / self.parts,
            host_bytes=kind.host_bytes / self.parts,
            live_bytes=kind.live_bytes / self.parts,
            params_bytes=kind.params_bytes / self.num_devices,
            seconds=kind.seconds + again * self.again_seconds,
        )

    def forward(self, forward: Forward) -> Forward:
        """Returns the cost of one more run of a block, with what it sends."""
        return dataclasses.replace(forward, seconds=forward.seconds + self.again_seconds)
