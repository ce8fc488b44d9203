"""The peak of a whole step, from the peaks of two compiled ones.

A step peaks where the loss is, when all that is kept is there, or while a stage is reversed:

    peak = max(head + scale * kept, body + scale * worst) + copies

`head` and `body` are what weights, optimizer, gradients and the loss add; `scale` is what the
compiler makes of a byte that JAX keeps (it may pad one array and drop another). The compiled
peaks of `full` and `none` tell them; `copies` are slices of the parameters, one to each stage of a
plan with several.
"""

import dataclasses

from jaxckpt.planner.pieces import Draft


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeakModel:
    """Predicts peaks; see this module's text.

    Attributes:
      head_bytes: Beside what is kept, at the loss.
      body_bytes: Beside what is kept and held, while a stage is reversed.
      scale: Compiled bytes for a kept one.
      params_bytes: Of all stacks, which several stages slice.
    """

    head_bytes: float
    body_bytes: float
    scale: float
    params_bytes: int

    @classmethod
    def between(cls, full: tuple[Draft, int], none: tuple[Draft, int], params_bytes: int):
        """Returns the model that is exact for two compiled plans.

        Args:
          full: `full` and its compiled peak.
          none: `none` and its compiled peak.
          params_bytes: As the attribute.
        """
        (full, full_peak), (none, none_peak) = full, none
        held = full.worst_bytes - full.kept_bytes
        more = none.kept_bytes - full.kept_bytes
        # How much of what `full` holds while it is reversed shows in its peak: all of it if both
        # steps peak in a stage, none of it if both peak at the loss.
        shown = (full_peak - full.kept_bytes) - (none_peak - none.kept_bytes)
        shown = min(max(shown, 0.0), held)
        scale = (none_peak - full_peak) / (more - shown) if more > shown else 1.0
        return cls(
            head_bytes=none_peak - scale * none.kept_bytes,
            body_bytes=full_peak - scale * full.worst_bytes,
            scale=scale,
            params_bytes=params_bytes,
        )

    def predict(self, draft: Draft) -> int:
        """Returns the predicted peak of a plan."""
        at_head = self.head_bytes + self.scale * draft.kept_bytes
        in_body = self.body_bytes + self.scale * draft.worst_bytes
        copies = self.params_bytes if len(draft.stages) > 1 else 0
        return int(max(at_head, in_body) + copies)
