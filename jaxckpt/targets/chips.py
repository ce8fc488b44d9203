"""The chips a step can be compiled for, each figure with its source. Standard library only.

A new chip is one row of `CHIPS`: its figures, its TPU slices or its GPU's architecture, and what
JAX calls it.

Every figure is of ONE JAX DEVICE, because a compiled step's memory is per device. A JAX device is a
chip, except for TPU v2, v3 and tpu7x, whose chips are two devices; there a vendor's figure of a
chip is halved. (v4 and v5p join their two cores into one device.)

`usable_bytes` is the memory that a program may fill:

- TPU: the memory that libtpu's compiler names when a program does not fit (libtpu 0.0.42);
- NVIDIA: three quarters of `memory_bytes`, which JAX preallocates by default
  (`XLA_PYTHON_CLIENT_MEM_FRACTION=0.75`). `memory_bytes` is the figure of one board's driver
  (OpenXLA's target_config specs; deviceQuery for t4, l4 and rtx4090); boards and drivers differ
  by a few percent.

`bf16_flops_per_second` are dense matrix products, without structured sparsity, at full clock: a
bound that no step reaches. `host_bytes_per_second` is one direction.

`interconnect_bytes_per_second` is the rate to neighbors in a ring: on a TPU over the two links of
one axis of its torus, on a GPU over NVLink, or over PCIe if it has no NVLink.
`network_bytes_per_second` is the rate to another host.

`slices` are the TPU slices that Google Cloud rents out: Cloud's number, the topology, JAX devices.
Cloud's number counts chips for v5e and v6e, and TensorCores for all others: `v5p-8` is four chips.
`tpu7x-8` is four chips too, and eight JAX devices. libtpu accepts every topology here
(checked against libtpu 0.0.42 and 0.0.50; 0.0.23 knows no tpu7x).
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """A TPU slice: Cloud's number, the grid of chips (`topology`), the number of JAX devices."""

    number: int
    topology: str
    num_devices: int


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The figures of an NVIDIA GPU that XLA's compiler asks for, beside its memory.

    Attributes:
      capability: NVIDIA's number of its architecture, `(9, 0)`.
      multiprocessors: The number of multiprocessors.
      float32_units: The float32 units of one multiprocessor.
      clock_ghz: The full clock, in GHz.
      l2_bytes: The size of the L2 cache.
    """

    capability: tuple[int, int]
    multiprocessors: int
    float32_units: int
    clock_ghz: float
    l2_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator; figures are of one JAX device of it.

    Attributes:
      name: The chip's word in a target.
      backend: `"tpu"` or `"cuda"`.
      devices_per_chip: The number of JAX devices of one chip.
      memory_bytes: The memory of the device.
      usable_bytes: The memory that a program may fill.
      bf16_flops_per_second: FLOPs per second of dense matrix products with bfloat16 inputs.
      memory_bytes_per_second: The rate of device memory.
      host_bytes_per_second: The rate of the link to the host, one direction.
      interconnect_bytes_per_second: The rate to neighbors, one direction.
      network_bytes_per_second: The rate to other hosts, one direction; 0 if the interconnect
        reaches them.
      source: The source of the figures.
      kinds: JAX's names of such a device (`device_kind`). Boards with other memory or clocks (H100
        PCIe, NVL, laptops, MIG slices) have other kinds.
      slices: The slices of a TPU, smallest first; empty for a GPU.
      gpu: Further figures of an NVIDIA GPU; None for a TPU.
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
    kinds: tuple[str, ...] = ()
    slices: tuple[Slice, ...] = ()
    gpu: Gpu | None = None

    def __repr__(self) -> str:
        return f"<Chip {self.name}>"  # the whole row would drown a target's repr


_GIB, _MIB = 1 << 30, 1 << 20
_PLANE = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_LARGE = (*_CUBE, "8x16x16", "16x16x16")
_HOST_V4 = "host link: 16 GB/s, How To Scale Your Model, chapter on TPUs"
_HOST_LIKE_V4 = f"{_HOST_V4}, for v4; none is published for this chip"


def tpu(
    name: str,
    *,
    gibibytes: int,
    usable_gib: float,  # that libtpu lets a program fill of one DEVICE
    tflops: float,  # in bfloat16
    gb_per_second: float,  # of its memory
    links: tuple[int, int],  # GB/s of all links, both directions; the number of axes of its torus
    topologies: tuple[str, ...],  # grids of chips that are rented out
    number: int,  # what one chip counts in Cloud's names of slices
    kinds: tuple[str, ...],
    source: str,
    devices: int = 1,  # JAX devices of a chip
) -> Chip:
    """Returns a TPU from its vendor's figures of a CHIP."""
    both_ways, axes = links
    chips = {topology: math.prod(map(int, topology.split("x"))) for topology in topologies}
    return Chip(
        name=name,
        backend="tpu",
        devices_per_chip=devices,
        memory_bytes=gibibytes * _GIB // devices,
        usable_bytes=int(usable_gib * _GIB),
        bf16_flops_per_second=tflops * 1e12 / devices,
        memory_bytes_per_second=gb_per_second * 1e9 / devices,
        host_bytes_per_second=16e9 / devices,
        interconnect_bytes_per_second=both_ways * 1e9 / 2 / axes / devices,
        source=f"{source}; {_HOST_V4 if name == 'v4' else _HOST_LIKE_V4}",
        kinds=kinds,
        slices=tuple(
            Slice(number=count * number, topology=topology, num_devices=count * devices)
            for topology, count in chips.items()
        ),
    )


def nvidia(
    name: str,
    *,
    memory_bytes: int,  # that its driver reports
    tflops: float,  # in bfloat16, dense
    gb_per_second: float,  # of its memory
    pcie: float,  # GB/s of the link to the host, one direction
    nvlink: int = 0,  # GB/s, both directions; 0 if GPUs talk over PCIe
    network: int = 0,  # Gbit/s of each GPU's network card in a DGX; 0 for GPUs of one host only
    gpu: Gpu,
    kinds: tuple[str, ...],  # the usual name first
    source: str,
) -> Chip:
    """Returns an NVIDIA GPU from its data sheet."""
    return Chip(
        name=name,
        backend="cuda",
        memory_bytes=memory_bytes,
        usable_bytes=memory_bytes * 3 // 4,
        bf16_flops_per_second=tflops * 1e12,
        memory_bytes_per_second=gb_per_second * 1e9,
        host_bytes_per_second=pcie * 1e9,
        interconnect_bytes_per_second=(nvlink or 2 * pcie) * 1e9 / 2,
        network_bytes_per_second=network * 1e9 / 8,
        source=source,
        kinds=kinds,
        gpu=gpu,
    )


_PCIE = {3: 15.75, 4: 31.5, 5: 63.0}  # GB/s of x16, one direction, after the line code

# v2 and v3 have four links of 496 and 656 Gbit/s, one direction (Jouppi et al. 2020, A
# domain-specific supercomputer for training deep neural networks). Links of the other TPUs are from
# Google Cloud's pages. NVLink and network cards: DGX A100, H100, H200 and B200 datasheets.
# A paragraph for each chip, so that chips can be compared.
# fmt: off
_ALL = (
    tpu("v2", gibibytes=16, usable_gib=7.48, tflops=46, gb_per_second=700, links=(496, 2), number=2,
        devices=2, topologies=("2x2", "4x4", "8x8", "8x16", "16x16"), kinds=("TPU v2",),
        source="Google Cloud, TPU v2: 46 TFLOPS, 16 GiB, 700 GB/s a chip"),
    tpu("v3", gibibytes=32, usable_gib=15.48, tflops=123, gb_per_second=900, links=(656, 2),
        number=2, devices=2, topologies=("2x2", *_PLANE[2:], "16x32", "32x32"), kinds=("TPU v3",),
        source="Google Cloud, TPU v3: 123 TFLOPS, 32 GiB, 900 GB/s a chip"),
    tpu("v4", gibibytes=32, usable_gib=30.75, tflops=275, gb_per_second=1200, links=(600, 3),
        number=2, topologies=_LARGE, kinds=("TPU v4",),
        source="Google Cloud, TPU v4: 275 TFLOPS, 32 GiB, 1200 GB/s"),
    tpu("v5e", gibibytes=16, usable_gib=15.75, tflops=197, gb_per_second=819, links=(400, 2),
        number=1, topologies=("1x1", *_PLANE), kinds=("TPU v5 lite", "TPU v5e"),
        source="Google Cloud, TPU v5e: 197 TFLOPS, 16 GB, 819 GB/s"),
    # 95 GiB are documented for v5p, but libtpu's compiler allows 95.74.
    tpu("v5p", gibibytes=96, usable_gib=95.74, tflops=459, gb_per_second=2765, links=(1200, 3),
        number=2, topologies=(*_LARGE, "16x16x24"), kinds=("TPU v5", "TPU v5p"),
        source="Google Cloud, TPU v5p: 459 TFLOPS, 95 GiB, 2765 GB/s"),
    tpu("v6e", gibibytes=32, usable_gib=31.25, tflops=918, gb_per_second=1638, links=(800, 2),
        number=1, topologies=("1x1", *_PLANE), kinds=("TPU v6 lite", "TPU v6e"),
        source="Google Cloud, TPU v6e: 918 TFLOPS, 32 GiB, 1638 GB/s"),
    tpu("tpu7x", gibibytes=192, usable_gib=94.75, tflops=2307, gb_per_second=7380, links=(1200, 3),
        number=2, devices=2, topologies=(*_LARGE, "16x16x24"), kinds=("TPU7x",),
        source="Google Cloud, TPU7x (Ironwood): 2307 TFLOPS, 192 GiB, 7380 GB/s a chip of two "
               "chiplets"),
    nvidia("t4", memory_bytes=15_642_329_088, tflops=65, gb_per_second=320, pcie=_PCIE[3],
        gpu=Gpu((7, 5), 40, 64, 1.59, 4 * _MIB), kinds=("Tesla T4",),
        source="NVIDIA T4 datasheet: 65 TFLOPS (float16; it has no bfloat16 units), 320 GB/s, "
               "PCIe 3"),
    nvidia("l4", memory_bytes=23_612_293_120, tflops=121, gb_per_second=300, pcie=_PCIE[4],
        gpu=Gpu((8, 9), 58, 128, 2.04, 48 * _MIB), kinds=("NVIDIA L4",),
        source="NVIDIA L4 datasheet: 242 TFLOPS with sparsity, 24 GB, 300 GB/s, PCIe 4"),
    nvidia("a100-40g", memory_bytes=42_331_013_120, tflops=312, gb_per_second=1555, pcie=_PCIE[4],
        nvlink=600, network=200, gpu=Gpu((8, 0), 108, 64, 1.41, 40 * _MIB),
        kinds=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        source="NVIDIA A100 datasheet, SXM 40GB: 312 TFLOPS, 1555 GB/s, PCIe 4"),
    nvidia("a100-80g", memory_bytes=85_100_068_864, tflops=312, gb_per_second=2039, pcie=_PCIE[4],
        nvlink=600, network=200, gpu=Gpu((8, 0), 108, 64, 1.41, 40 * _MIB),
        kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        source="NVIDIA A100 datasheet, SXM 80GB: 312 TFLOPS, 2039 GB/s, PCIe 4"),
    nvidia("rtx4090", memory_bytes=25_250_627_584, tflops=165.2, gb_per_second=1008, pcie=_PCIE[4],
        gpu=Gpu((8, 9), 128, 128, 2.52, 72 * _MIB), kinds=("NVIDIA GeForce RTX 4090",),
        source="NVIDIA Ada GPU Architecture whitepaper: 165.2 TFLOPS with float32 sums, 1008 "
               "GB/s, PCIe 4"),
    nvidia("h100", memory_bytes=84_942_979_072, tflops=989.4, gb_per_second=3352, pcie=_PCIE[5],
        nvlink=900, network=400, gpu=Gpu((9, 0), 132, 128, 1.98, 50 * _MIB),
        kinds=("NVIDIA H100 80GB HBM3",),
        source="NVIDIA H100 datasheet, SXM: 1979 TFLOPS with sparsity, 80 GB, 3.35 TB/s, PCIe 5"),
    nvidia("h200", memory_bytes=151_397_597_184, tflops=989.4, gb_per_second=4800, pcie=_PCIE[5],
        nvlink=900, network=400, gpu=Gpu((9, 0), 132, 128, 1.98, 50 * _MIB), kinds=("NVIDIA H200",),
        source="NVIDIA H200 datasheet, SXM: 1979 TFLOPS with sparsity, 141 GB, 4.8 TB/s, PCIe 5"),
    nvidia("b200", memory_bytes=191_514_411_008, tflops=2250, gb_per_second=7672, pcie=_PCIE[5],
        nvlink=1800, network=400, gpu=Gpu((10, 0), 148, 128, 1.965, 132_644_864),
        kinds=("NVIDIA B200",),
        source="NVIDIA HGX B200 datasheet: 4.5 PFLOPS with sparsity, 180 GB, 7.7 TB/s, PCIe 5"),
)
# fmt: on

CHIPS: dict[str, Chip] = {chip.name: chip for chip in _ALL}
