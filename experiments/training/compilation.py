"""How a step is compiled on each kind of chip: unrolled blocks, XLA's options, the folder of steps.

Each choice was measured in pairs on its kind of chip. Other chips get XLA's defaults.
"""

import os
from collections.abc import Callable
from pathlib import Path

from experiments.files import reason
from jaxckpt.compiled import cache
from jaxckpt.plans import Plan

# Unrolled blocks are compiled one after another, so a deep stack would compile for minutes.
_MOST_UNROLLED = 64
_KEEPING = ("none", "full")

# XLA merges products that share an operand (queries, keys and values; gate and up). That costs
# copies of weights and gradients, and elementwise work that can no longer be fused.
_GPU_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}


def choose_unroll(plan: Plan, platform: str, num_devices: int = 1) -> tuple[int, str]:
    """Returns the blocks to unroll in one trip of the stack's loop, and a line that says why.

    A loop copies each residual that it keeps into a stacked buffer, which is zeroed first, and out
    of it again. Unrolled blocks copy nothing, and take longer to compile. `platform` is `"cpu"`,
    `"gpu"` or `"tpu"`.
    """
    kept = [stage for stage in plan.stages if stage.schedule in _KEEPING]
    if platform != "gpu":
        return 1, f"unroll 1: a loop compiles fastest, and on {platform} no gain is known"
    if num_devices > 1:
        # Unrolled, several blocks' weights and gradients wait for one joined exchange.
        return 1, "unroll 1: in a loop, one block at a time is gathered and reduced"
    if len(kept) < len(plan.stages):
        return 1, "unroll 1: schedules run in loops"
    if any(policy.kind == "offload" for stage in kept for policy in stage.policies):
        return 1, "unroll 1: what is moved to the host is moved in a loop"
    if plan.bound_count > _MOST_UNROLLED:
        return 1, f"unroll 1: more than {_MOST_UNROLLED} blocks would compile for minutes"
    return plan.bound_count, (
        f"unroll {plan.bound_count}: kept residuals are not copied in and out of a loop's buffers; "
        "unroll 1 compiles two to three times as fast"
    )


def compiler_options(platform: str) -> dict[str, int]:
    """Returns XLA's options for the step on a kind of chip, such as `"gpu"`."""
    return dict(_GPU_OPTIONS) if platform == "gpu" else {}


def keep_compiled(folder: Path | None, say: Callable[[str], object]):
    """Has JAX keep compiled steps in a folder, by default in the cache folder.

    Without a folder that can be written, `say` gets a warning.
    """
    import jax  # commands that compile only in other processes need no JAX

    home = cache.folder()
    if folder is None and home is not None:
        folder = home / "compiled"
    try:
        if folder is None:
            raise OSError("there is no home folder")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise OSError(f"no permission to write to {folder}")
    except OSError as error:
        say(f"warning: compiled steps are not kept on disk: {reason(error)}")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
