"""The TPU slices there are: Google Cloud's name, the topology, JAX devices. Standard library only.

Cloud's number after the dash counts chips for v5e and v6e, and TensorCores for the rest: `v5p-8`
is four chips. `tpu7x-8` is four chips too, and eight JAX devices. libtpu accepts every topology
here (checked against libtpu 0.0.42 and 0.0.50; 0.0.23 knows no tpu7x).
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """One slice: `number` is Cloud's, `topology` the chips' grid, `num_devices` JAX's."""

    number: int
    topology: str
    num_devices: int


_PLANE = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_LARGE = (*_CUBE, "8x16x16", "16x16x16")


def _slices(topologies: tuple[str, ...], *, number: int, devices: int) -> tuple[Slice, ...]:
    """Returns slices whose chips count `number` in Cloud's name and are `devices` JAX devices."""
    found = []
    for topology in topologies:
        chips = math.prod(map(int, topology.split("x")))
        one = Slice(number=chips * number, topology=topology, num_devices=chips * devices)
        found.append(one)
    return tuple(found)


SLICES: dict[str, tuple[Slice, ...]] = {
    "v2": _slices(("2x2", "4x4", "8x8", "8x16", "16x16"), number=2, devices=2),
    "v3": _slices(("2x2", *_PLANE[2:]), number=2, devices=2),
    "v4": _slices(_LARGE, number=2, devices=1),
    "v5e": _slices(("1x1", *_PLANE[:-2]), number=1, devices=1),
    "v5p": _slices((*_LARGE, "16x16x24"), number=2, devices=1),
    "v6e": _slices(("1x1", *_PLANE[:-2]), number=1, devices=1),
    "tpu7x": _slices((*_LARGE, "16x16x24"), number=2, devices=2),
}
