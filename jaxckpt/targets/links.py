"""The links of a device: to other devices, and to its host's memory. Standard library only.

`Links` has the rates between devices, `HostLink` the time that copies to and from the host add to a
computation.
"""

import dataclasses
import math

from jaxckpt.targets.chips import Chip
from jaxckpt.targets.target import HOST_GPUS

# The share of a link's data sheet that collectives of large arrays reach: assumed, not measured.
_SHARE = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Links:
    """The links of one device.

    Attributes:
      bytes_per_second: The rate to near devices.
      near: How many devices with consecutive numbers are near one another; 0 for all.
      far_bytes_per_second: The rate to other devices.
    """

    bytes_per_second: float
    near: int = 0
    far_bytes_per_second: float = math.inf

    def rate(self, group: tuple[int, ...]) -> float:
        """Returns the rate of a group of devices in a ring, which is its slowest link's."""
        if self.near and len({device // self.near for device in group}) > 1:
            return min(self.bytes_per_second, self.far_bytes_per_second)
        return self.bytes_per_second


def links_of(chip: Chip) -> Links:
    """Returns the links of one device of a chip, at the rates that programs reach.

    All devices of a TPU slice are near. GPUs of one host are near; JAX numbers them consecutively.
    """
    near = _SHARE * chip.interconnect_bytes_per_second
    if not chip.network_bytes_per_second:
        return Links(bytes_per_second=near)
    far = _SHARE * chip.network_bytes_per_second
    return Links(bytes_per_second=near, near=HOST_GPUS, far_bytes_per_second=far)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostLink:
    """A device's link to its host, and whether copies overlap the computation.

    On NVIDIA GPUs they do not: Qwen3-0.6B's step at 8 x 1024 tokens is slower under `offload:q,k,v`
    than under `names:q,k,v` by the full time of its copies (`benchmarks.xla_options --plan`), even
    with XLA's latency-hiding scheduler. On TPUs they are assumed to overlap, which is not measured.

    Attributes:
      bytes_per_second: The rate in one direction.
      overlaps: Whether copies run beside the computation.
    """

    bytes_per_second: float
    overlaps: bool = True

    def seconds(self, work_seconds: float, moved_bytes: float) -> float:
        """Returns the seconds of a computation that moves bytes over the link in one direction."""
        copies = moved_bytes / self.bytes_per_second
        return max(work_seconds, copies) if self.overlaps else work_seconds + copies
