"""XLA's `target_config` of an NVIDIA GPU: what its compiler asks a device that is not there.

The text is a `GpuTargetConfigProto`. What a GPU of one architecture shares stands once; figures
are those of OpenXLA's target_config specs and of NVIDIA's compute capability tables.
"""

from jaxckpt.targets.chips import Chip

# (compute capability, multiprocessors, FP32 units of each, GHz, L2 bytes, name)
_GPUS = {
    "t4": ((7, 5), 40, 64, 1.59, 4 << 20, "Tesla T4"),
    "l4": ((8, 9), 58, 128, 2.04, 48 << 20, "NVIDIA L4"),
    "a100-40g": ((8, 0), 108, 64, 1.41, 40 << 20, "NVIDIA A100-SXM4-40GB"),
    "a100-80g": ((8, 0), 108, 64, 1.41, 40 << 20, "NVIDIA A100-SXM4-80GB"),
    "rtx4090": ((8, 9), 128, 128, 2.52, 72 << 20, "NVIDIA GeForce RTX 4090"),
    "h100": ((9, 0), 132, 128, 1.98, 50 << 20, "NVIDIA H100 80GB HBM3"),
    "h200": ((9, 0), 132, 128, 1.98, 50 << 20, "NVIDIA H200"),
    "b200": ((10, 0), 148, 128, 1.965, 132644864, "NVIDIA B200"),
}

# Compute capability -> (shared memory of a multiprocessor, most of it one block can have, threads).
_ARCHITECTURES = {
    (7, 5): (65536, 65536, 1024),
    (8, 0): (167936, 166912, 2048),
    (8, 9): (102400, 101376, 1536),
    (9, 0): (233472, 232448, 2048),
    (10, 0): (233472, 232448, 2048),
}


def compute_capability(chip: Chip) -> tuple[int, int] | None:
    """Returns NVIDIA's number of a chip's architecture, such as `(9, 0)`; None for a TPU."""
    return _GPUS[chip.name][0] if chip.name in _GPUS else None


def target_config(chip: Chip, cudnn: tuple[int, int, int] = (9, 10, 0)) -> str:
    """Returns the text proto that `get_topology_desc(target_config=)` takes for a chip.

    Args:
      chip: An NVIDIA chip of `chips.CHIPS`.
      cudnn: The version of cuDNN that the program would run with.
    """
    capability, cores, units, clock, l2_bytes, name = _GPUS[chip.name]
    shared, shared_optin, threads = _ARCHITECTURES[capability]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.memory_bytes_per_second)}
  l2_cache_size: {l2_bytes}
  clock_rate_ghz: {clock}
  device_memory_size: {chip.memory_bytes}
  shared_memory_per_block_optin: {shared_optin}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""
