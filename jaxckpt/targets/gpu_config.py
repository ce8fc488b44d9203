"""XLA's `target_config` of an NVIDIA GPU: the figures its compiler needs for an absent device.

The text is a `GpuTargetConfigProto`. Figures of an architecture are here, figures of a chip in its
row of `chips.py`. They are from OpenXLA's target_config specs and NVIDIA's compute capability
tables.
"""

from jaxckpt.targets.chips import Chip

# Compute capability -> (shared memory of a multiprocessor, its most for one block, threads).
_ARCHITECTURES = {
    (7, 5): (65536, 65536, 1024),
    (8, 0): (167936, 166912, 2048),
    (8, 9): (102400, 101376, 1536),
    (9, 0): (233472, 232448, 2048),
    (10, 0): (233472, 232448, 2048),
}


def compute_capability(chip: Chip) -> tuple[int, int] | None:
    """Returns NVIDIA's number of a chip's architecture, such as `(9, 0)`; None for a TPU."""
    return None if chip.gpu is None else chip.gpu.capability


def target_config(chip: Chip, cudnn: tuple[int, int, int] = (9, 10, 0)) -> str:
    """Returns XLA's `target_config` of an NVIDIA chip, for a program that runs with this cuDNN."""
    gpu = chip.gpu
    assert gpu is not None, chip
    capability = gpu.capability
    shared, shared_optin, threads = _ARCHITECTURES[capability]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: {threads}
  core_count: {gpu.multiprocessors}
  fpus_per_core: {gpu.float32_units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.memory_bytes_per_second)}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {chip.memory_bytes}
  shared_memory_per_block_optin: {shared_optin}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{chip.kinds[0]}"
"""
