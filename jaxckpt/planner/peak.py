"""The peak of a whole step, from the peaks of three compiled ones.

    peak = offset + the most that is kept and held while a stage is reversed

`offset` is what weights, optimizer, gradients and the loss add; the compiled peak of `full` tells
it. That of `none` tells what a block's residuals weigh once compiled: XLA drops some that JAX
keeps and pads others. Plans of several stages slice the parameters and join their gradients, which
costs or saves a backend's own amount: a plan of two stages tells it. Of policies the bytes that
JAX keeps are believed.
"""

import dataclasses

from jaxckpt.planner.costs import Kind
from jaxckpt.planner.pieces import Draft, draft, run_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeakModel:
    """Predicts peaks; see this module's text.

    Attributes:
      none: The kind `none` as it is once compiled.
      offset_bytes: Beside what the stacks keep and hold.
      stages_bytes: Added for a plan of several stages; may be negative.
    """

    none: Kind
    offset_bytes: float
    stages_bytes: float = 0.0

    @classmethod
    def between(cls, full: Kind, full_peak: int, none: Kind, none_peak: int, num_blocks: int):
        """Returns the model that is exact for two compiled plans.

        Args:
          full: `full` as traced.
          full_peak: Its compiled peak.
          none: `none` as traced.
          none_peak: Its compiled peak.
          num_blocks: L.
        """
        offset = full_peak - draft([run_of(full, num_blocks)]).worst_bytes
        held = run_of(none, num_blocks).live_bytes
        kept = max((none_peak - offset - held) / num_blocks, full.kept_bytes)
        return cls(none=dataclasses.replace(none, kept_bytes=kept), offset_bytes=offset)

    def with_stages(self, one: Draft, peak: int) -> "PeakModel":
        """Returns the model that is exact for a compiled plan of several stages, too."""
        extra = peak - self.offset_bytes - one.worst_bytes
        return dataclasses.replace(self, stages_bytes=extra)

    def predict(self, one: Draft) -> int:
        """Returns the predicted peak of a plan."""
        extra = self.stages_bytes if len(one.stages) > 1 else 0.0
        return int(self.offset_bytes + one.worst_bytes + extra)
