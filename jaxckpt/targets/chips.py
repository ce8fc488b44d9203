"""The chips a step can be compiled for, each figure with its source. Standard library only.

Every figure is of ONE JAX DEVICE, since that is what a compiled step's memory is of. A JAX device
is a chip, but for TPU v2, v3 and tpu7x, whose chips are two devices: there a vendor's figure of a
chip is halved. (v4 and v5p join their two cores into one device.)

`usable_bytes` is what a program may fill:

- TPU: what libtpu's compiler names as available where a program does not fit (libtpu 0.0.42);
- NVIDIA: three quarters of `memory_bytes`, as JAX preallocates by default
  (`XLA_PYTHON_CLIENT_MEM_FRACTION=0.75`). `memory_bytes` is what the driver of one such board said
  (OpenXLA's target_config specs; deviceQuery for t4, l4 and rtx4090); boards and drivers differ
  by a few percent.

`bf16_flops_per_second` are dense matrix products, without structured sparsity, at full clock: a
bound, not what a step reaches. `host_bytes_per_second` is one direction.

`interconnect_bytes_per_second` is what a device sends to its neighbors in a ring: on a TPU over the
two links of one axis of its torus, on a GPU over NVLink, or over PCIe where it has none.
`network_bytes_per_second` is what it sends to another host, beyond `host_devices` of them.

The TPU slices there are: Google Cloud's name, the topology, JAX devices.

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator; figures are of one JAX device of it.

    Attributes:
      name: Its word in a target.
      backend: `"tpu"` or `"cuda"`.
      devices_per_chip: JAX devices that a chip is.
      memory_bytes: What the device has.
      usable_bytes: What a program may fill.
      bf16_flops_per_second: Dense matrix products with bfloat16 inputs.
      memory_bytes_per_second: Device memory.
      host_bytes_per_second: The link to the host, one direction.
      interconnect_bytes_per_second: To neighbors, one direction.
      network_bytes_per_second: To other hosts, one direction; 0 where the interconnect goes there.
      source: Where the figures are from.
      slices: TPU: the slices there are, smallest first.
    """

    name: str
    backend: str
    devices_per_chip: int = 1
    memory_bytes: int
    usable_bytes: int
    bf16_flops_per_second: float
    memory_bytes_per_second: float
    host_bytes_per_second: float
    interconnect_bytes_per_second: float
    network_bytes_per_second: float = 0.0
    source: str
    slices: tuple[Slice, ...] = ()

    def __repr__(self) -> str:
        return f"<Chip {self.name}>"  # a target's repr is read, the table is not


_GIB = 1 << 30
_HOST_V4 = "host link: 16 GB/s, How To Scale Your Model, chapter on TPUs"
_HOST_LIKE_V4 = f"{_HOST_V4}, for v4; none is published for this chip"


# Both directions of all links of a chip in GB/s, and the axes of its torus. v2 and v3: four links
# of 496 and 656 Gbit/s one direction (Jouppi et al. 2020, A domain-specific supercomputer for
# training deep neural networks); the rest: Google Cloud's pages of each TPU.
_TORUS = {
    **{"v2": (496, 2), "v3": (656, 2), "v4": (600, 3), "v5e": (400, 2), "v5p": (1200, 3)},
    **{"v6e": (800, 2), "tpu7x": (1200, 3)},
}


def _tpu(name, gibibytes, usable_gib, tflops, gigabytes_per_second, source, devices=1) -> Chip:
    """Returns a TPU from the vendor's figures of a CHIP and libtpu's of a device."""
    both_ways, axes = _TORUS[name]
    return Chip(
        name=name,
        backend="tpu",
        devices_per_chip=devices,
        memory_bytes=gibibytes * _GIB // devices,
        usable_bytes=int(usable_gib * _GIB),
        bf16_flops_per_second=tflops * 1e12 / devices,
        memory_bytes_per_second=gigabytes_per_second * 1e9 / devices,
        host_bytes_per_second=16e9 / devices,
        interconnect_bytes_per_second=both_ways * 1e9 / 2 / axes / devices,
        source=f"{source}; {_HOST_V4 if name == 'v4' else _HOST_LIKE_V4}",
        slices=SLICES[name],
    )


# NVLink in GB/s both ways, and the network card that each GPU of NVIDIA's own machine (DGX) has, in
# Gbit/s: DGX A100, H100, H200 and B200 datasheets. The rest talk over PCIe, within one host.
_DGX = {
    **{"a100-40g": (600, 200), "a100-80g": (600, 200), "h100": (900, 400), "h200": (900, 400)},
    **{"b200": (1800, 400)},
}


def _nvidia(name, memory_bytes, tflops, gigabytes_per_second, host, source) -> Chip:
    nvlink, network = _DGX.get(name, (2 * host, 0))
    return Chip(
        name=name,
        backend="cuda",
        memory_bytes=memory_bytes,
        usable_bytes=memory_bytes * 3 // 4,
        bf16_flops_per_second=tflops * 1e12,
        memory_bytes_per_second=gigabytes_per_second * 1e9,
        host_bytes_per_second=host * 1e9,
        interconnect_bytes_per_second=nvlink * 1e9 / 2,
        network_bytes_per_second=network * 1e9 / 8,
        source=source,
    )


_PCIE = {3: 15.75, 4: 31.5, 5: 63.0}  # x16, one direction, after the line code

_ALL = (
    _tpu("v2", 16, 7.48, 46, 700, "Google Cloud, TPU v2: 46 TFLOPS, 16 GiB, 700 GB/s a chip", 2),
    _tpu("v3", 32, 15.48, 123, 900, "Google Cloud, TPU v3: 123 TFLOPS, 32 GiB, 900 GB/s a chip", 2),
    _tpu("v4", 32, 30.75, 275, 1200, "Google Cloud, TPU v4: 275 TFLOPS, 32 GiB, 1200 GB/s"),
    _tpu("v5e", 16, 15.75, 197, 819, "Google Cloud, TPU v5e: 197 TFLOPS, 16 GB, 819 GB/s"),
    # 95 GiB are documented, and libtpu's compiler has 95.74 of 96 for programs.
    _tpu("v5p", 96, 95.74, 459, 2765, "Google Cloud, TPU v5p: 459 TFLOPS, 95 GiB, 2765 GB/s"),
    _tpu("v6e", 32, 31.25, 918, 1638, "Google Cloud, TPU v6e: 918 TFLOPS, 32 GiB, 1638 GB/s"),
    _tpu(
        *("tpu7x", 192, 94.75, 2307, 7380),
        "Google Cloud, TPU7x (Ironwood): 2307 TFLOPS, 192 GiB, 7380 GB/s a chip of two chiplets",
        2,
    ),
    _nvidia(
        *("t4", 15_642_329_088, 65, 320, _PCIE[3]),
        "NVIDIA T4 datasheet: 65 TFLOPS (float16; it has no bfloat16 units), 320 GB/s, PCIe 3",
    ),
    _nvidia(
        *("l4", 23_612_293_120, 121, 300, _PCIE[4]),
        "NVIDIA L4 datasheet: 242 TFLOPS with sparsity, 24 GB, 300 GB/s, PCIe 4",
    ),
    _nvidia(
        *("a100-40g", 42_331_013_120, 312, 1555, _PCIE[4]),
        "NVIDIA A100 datasheet, SXM 40GB: 312 TFLOPS, 1555 GB/s, PCIe 4",
    ),
    _nvidia(
        *("a100-80g", 85_100_068_864, 312, 2039, _PCIE[4]),
        "NVIDIA A100 datasheet, SXM 80GB: 312 TFLOPS, 2039 GB/s, PCIe 4",
    ),
    _nvidia(
        *("rtx4090", 25_250_627_584, 165.2, 1008, _PCIE[4]),
        "NVIDIA Ada GPU Architecture whitepaper: 165.2 TFLOPS with float32 sums, 1008 GB/s, PCIe 4",
    ),
    _nvidia(
        *("h100", 84_942_979_072, 989.4, 3352, _PCIE[5]),
        "NVIDIA H100 datasheet, SXM: 1979 TFLOPS with sparsity, 80 GB, 3.35 TB/s, PCIe 5",
    ),
    _nvidia(
        *("h200", 151_397_597_184, 989.4, 4800, _PCIE[5]),
        "NVIDIA H200 datasheet, SXM: 1979 TFLOPS with sparsity, 141 GB, 4.8 TB/s, PCIe 5",
    ),
    _nvidia(
        *("b200", 191_514_411_008, 2250, 7672, _PCIE[5]),
        "NVIDIA HGX B200 datasheet: 4.5 PFLOPS with sparsity, 180 GB, 7.7 TB/s, PCIe 5",
    ),
)

CHIPS: dict[str, Chip] = {chip.name: chip for chip in _ALL}
