"""The links of a device: to other devices, and to its host's memory. Standard library only.

`Links` says what a device sends to others in a second, `HostLink` what copies to and from the host
cost a computation.
"""

import dataclasses
import math

from jaxckpt.targets.chips import Chip
from jaxckpt.targets.target import HOST_GPUS

# What collectives of large arrays reach of a link's data sheet; as for the rates of `roofline.py`,
# nobody has measured another share here.
_SHARE = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Links:
    """Links of one device.

    Attributes:
      bytes_per_second: To devices near it.
      near: Devices that are near one another, in the order of their numbers; 0 for all.
      far_bytes_per_second: To others.
    """

    bytes_per_second: float
    near: int = 0
    far_bytes_per_second: float = math.inf

    def rate(self, group: tuple[int, ...]) -> float:
        """Returns the rate of devices that send around a ring: the rate of its slowest link."""
        if self.near and len({device // self.near for device in group}) > 1:
            return min(self.bytes_per_second, self.far_bytes_per_second)
        return self.bytes_per_second


def links_of(chip: Chip) -> Links:
    """Returns what one device of a chip reaches of its data sheet.

    A TPU slice is one network. GPUs of one host are near, in the order that JAX numbers them.
    """
    near = _SHARE * chip.interconnect_bytes_per_second
    if not chip.network_bytes_per_second:
        return Links(bytes_per_second=near)
    far = _SHARE * chip.network_bytes_per_second
    return Links(bytes_per_second=near, near=HOST_GPUS, far_bytes_per_second=far)


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
