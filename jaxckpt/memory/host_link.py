"""The link between a device and its host's memory, and what copies over it cost a computation."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostLink:
    """A link, and whether a step goes on while it copies.

    On NVIDIA GPUs it does not: Qwen3-0.6B's step at 8 x 1024 tokens takes as much longer under
    `offload:q,k,v` than under `names:q,k,v` as its copies take alone (`benchmarks.xla_options
    --plan`), with XLA's latency-hiding scheduler too. On TPUs it is taken to, which nobody has
    timed.

    Attributes:
      bytes_per_second: One direction.
      overlaps: Whether copies run beside the computation.
    """

    bytes_per_second: float
    overlaps: bool = True

    def seconds(self, work_seconds: float, moved_bytes: float) -> float:
        """Returns what a computation takes that moves bytes over the link, one after another."""
        copies = moved_bytes / self.bytes_per_second
        return max(work_seconds, copies) if self.overlaps else work_seconds + copies
