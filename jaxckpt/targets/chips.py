"""The chips a step can be compiled for, each figure with its source. Standard library only.

A new chip is one row of `CHIPS`: its figures, its TPU slices or its GPU's architecture, and what
JAX calls it.

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
`network_bytes_per_second` is what it sends to another host.

`slices` are the TPU slices that Google Cloud rents out: Cloud's number, the topology, JAX devices.
The number after the dash counts chips for v5e and v6e, and TensorCores for the rest: `v5p-8` is
four chips. `tpu7x-8` is four chips too, and eight JAX devices. libtpu accepts every topology here
(checked against libtpu 0.0.42 and 0.0.50; 0.0.23 knows no tpu7x).
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """One slice: `number` is Cloud's, `topology` the chips' grid, `num_devices` JAX's."""

    number: int
    topology: str
    num_devices: int


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks of an NVIDIA GPU, beside its memory.

    Attributes:
      capability: NVIDIA's number of its architecture, `(9, 0)`.
      multiprocessors: How many it has.
      float32_units: Of one multiprocessor.
      clock_ghz: At full clock.
      l2_bytes: Its second cache.
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
      kinds: What JAX calls such a device (`device_kind`). Boards with other memory or clocks (H100
        PCIe, NVL, laptops, MIG slices) have other kinds.
      slices: TPU: the slices there are, smallest first.
      gpu: NVIDIA: what its compiler asks beside this.
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
        return f"<Chip {self.name}>"  # a target's repr is read, the table is not


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
    usable_gib: float,
    tflops: float,
    gb_per_second: float,
    links: tuple[int, int],
    topologies: tuple[str, ...],
    number: int,
    kinds: tuple[str, ...],
    source: str,
    devices: int = 1,
) -> Chip:
    """Returns a TPU from its vendor's figures of a CHIP.

    Args:
      name: Its word in a target.
      gibibytes: Memory of a chip.
      usable_gib: What libtpu lets a program fill of one DEVICE.
      tflops: In bfloat16.
      gb_per_second: Of its memory.
      links: GB/s of all its links, both directions, and the axes of its torus.
      topologies: Grids of chips that are rented out.
      number: What a chip counts in Cloud's names of slices.
      kinds: What JAX calls one of its devices.
      source: Where the figures are from.
      devices: JAX devices of a chip.
    """
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
    memory_bytes: int,
    tflops: float,
    gb_per_second: float,
    pcie: float,
    nvlink: int = 0,
    network: int = 0,
    gpu: Gpu,
    kinds: tuple[str, ...],
    source: str,
) -> Chip:
    """Returns an NVIDIA GPU from its data sheet.

    Args:
      name: Its word in a target.
      memory_bytes: What its driver says.
      tflops: In bfloat16, dense.
      gb_per_second: Of its memory.
      pcie: GB/s of its link to the host, one direction.
      nvlink: GB/s, both directions; 0 where GPUs talk over PCIe.
      network: Gbit/s of the card that each GPU of NVIDIA's own machine (DGX) has; 0 for GPUs that
        only talk within one host.
      gpu: What its compiler asks.
      kinds: What JAX calls it, the usual name first.
      source: Where the figures are from.
    """
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

# Links of v2 and v3: four of 496 and 656 Gbit/s one direction (Jouppi et al. 2020, A
# domain-specific supercomputer for training deep neural networks); of the other TPUs: Google
# Cloud's pages of each. NVLink and network cards: DGX A100, H100, H200 and B200 datasheets.
_ALL = (
    tpu(
        "v2",
        gibibytes=16,
        usable_gib=7.48,
        tflops=46,
        gb_per_second=700,
        links=(496, 2),
        topologies=("2x2", "4x4", "8x8", "8x16", "16x16"),
        number=2,
        kinds=("TPU v2",),
        source="Google Cloud, TPU v2: 46 TFLOPS, 16 GiB, 700 GB/s a chip",
        devices=2,
    ),
    tpu(
        "v3",
        gibibytes=32,
        usable_gib=15.48,
        tflops=123,
        gb_per_second=900,
        links=(656, 2),
        topologies=("2x2", *_PLANE[2:], "16x32", "32x32"),
        number=2,
        kinds=("TPU v3",),
        source="Google Cloud, TPU v3: 123 TFLOPS, 32 GiB, 900 GB/s a chip",
        devices=2,
    ),
    tpu(
        "v4",
        gibibytes=32,
        usable_gib=30.75,
        tflops=275,
        gb_per_second=1200,
        links=(600, 3),
        topologies=_LARGE,
        number=2,
        kinds=("TPU v4",),
        source="Google Cloud, TPU v4: 275 TFLOPS, 32 GiB, 1200 GB/s",
    ),
    tpu(
        "v5e",
        gibibytes=16,
        usable_gib=15.75,
        tflops=197,
        gb_per_second=819,
        links=(400, 2),
        topologies=("1x1", *_PLANE),
        number=1,
        kinds=("TPU v5 lite", "TPU v5e"),
        source="Google Cloud, TPU v5e: 197 TFLOPS, 16 GB, 819 GB/s",
    ),
    tpu(
        "v5p",
        gibibytes=96,
        usable_gib=95.74,  # 95 GiB are documented, and libtpu's compiler has 95.74 for programs
        tflops=459,
        gb_per_second=2765,
        links=(1200, 3),
        topologies=(*_LARGE, "16x16x24"),
        number=2,
        kinds=("TPU v5", "TPU v5p"),
        source="Google Cloud, TPU v5p: 459 TFLOPS, 95 GiB, 2765 GB/s",
    ),
    tpu(
        "v6e",
        gibibytes=32,
        usable_gib=31.25,
        tflops=918,
        gb_per_second=1638,
        links=(800, 2),
        topologies=("1x1", *_PLANE),
        number=1,
        kinds=("TPU v6 lite", "TPU v6e"),
        source="Google Cloud, TPU v6e: 918 TFLOPS, 32 GiB, 1638 GB/s",
    ),
    tpu(
        "tpu7x",
        gibibytes=192,
        usable_gib=94.75,
        tflops=2307,
        gb_per_second=7380,
        links=(1200, 3),
        topologies=(*_LARGE, "16x16x24"),
        number=2,
        kinds=("TPU7x",),
        source="Google Cloud, TPU7x (Ironwood): 2307 TFLOPS, 192 GiB, 7380 GB/s a chip of two "
        "chiplets",
        devices=2,
    ),
    nvidia(
        "t4",
        memory_bytes=15_642_329_088,
        tflops=65,
        gb_per_second=320,
        pcie=_PCIE[3],
        gpu=Gpu((7, 5), 40, 64, 1.59, 4 * _MIB),
        kinds=("Tesla T4",),
        source="NVIDIA T4 datasheet: 65 TFLOPS (float16; it has no bfloat16 units), 320 GB/s, "
        "PCIe 3",
    ),
    nvidia(
        "l4",
        memory_bytes=23_612_293_120,
        tflops=121,
        gb_per_second=300,
        pcie=_PCIE[4],
        gpu=Gpu((8, 9), 58, 128, 2.04, 48 * _MIB),
        kinds=("NVIDIA L4",),
        source="NVIDIA L4 datasheet: 242 TFLOPS with sparsity, 24 GB, 300 GB/s, PCIe 4",
    ),
    nvidia(
        "a100-40g",
        memory_bytes=42_331_013_120,
        tflops=312,
        gb_per_second=1555,
        pcie=_PCIE[4],
        nvlink=600,
        network=200,
        gpu=Gpu((8, 0), 108, 64, 1.41, 40 * _MIB),
        kinds=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        source="NVIDIA A100 datasheet, SXM 40GB: 312 TFLOPS, 1555 GB/s, PCIe 4",
    ),
    nvidia(
        "a100-80g",
        memory_bytes=85_100_068_864,
        tflops=312,
        gb_per_second=2039,
        pcie=_PCIE[4],
        nvlink=600,
        network=200,
        gpu=Gpu((8, 0), 108, 64, 1.41, 40 * _MIB),
        kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        source="NVIDIA A100 datasheet, SXM 80GB: 312 TFLOPS, 2039 GB/s, PCIe 4",
    ),
    nvidia(
        "rtx4090",
        memory_bytes=25_250_627_584,
        tflops=165.2,
        gb_per_second=1008,
        pcie=_PCIE[4],
        gpu=Gpu((8, 9), 128, 128, 2.52, 72 * _MIB),
        kinds=("NVIDIA GeForce RTX 4090",),
        source="NVIDIA Ada GPU Architecture whitepaper: 165.2 TFLOPS with float32 sums, "
        "1008 GB/s, PCIe 4",
    ),
    nvidia(
        "h100",
        memory_bytes=84_942_979_072,
        tflops=989.4,
        gb_per_second=3352,
        pcie=_PCIE[5],
        nvlink=900,
        network=400,
        gpu=Gpu((9, 0), 132, 128, 1.98, 50 * _MIB),
        kinds=("NVIDIA H100 80GB HBM3",),
        source="NVIDIA H100 datasheet, SXM: 1979 TFLOPS with sparsity, 80 GB, 3.35 TB/s, PCIe 5",
    ),
    nvidia(
        "h200",
        memory_bytes=151_397_597_184,
        tflops=989.4,
        gb_per_second=4800,
        pcie=_PCIE[5],
        nvlink=900,
        network=400,
        gpu=Gpu((9, 0), 132, 128, 1.98, 50 * _MIB),
        kinds=("NVIDIA H200",),
        source="NVIDIA H200 datasheet, SXM: 1979 TFLOPS with sparsity, 141 GB, 4.8 TB/s, PCIe 5",
    ),
    nvidia(
        "b200",
        memory_bytes=191_514_411_008,
        tflops=2250,
        gb_per_second=7672,
        pcie=_PCIE[5],
        nvlink=1800,
        network=400,
        gpu=Gpu((10, 0), 148, 128, 1.965, 132_644_864),
        kinds=("NVIDIA B200",),
        source="NVIDIA HGX B200 datasheet: 4.5 PFLOPS with sparsity, 180 GB, 7.7 TB/s, PCIe 5",
    ),
)

CHIPS: dict[str, Chip] = {chip.name: chip for chip in _ALL}
