"""Chips that are not there, as compile targets: `jaxckpt.measure` needs none of them."""

import importlib.util
import os
from collections.abc import Callable

TPU = "TPU v5e (not present)"
TARGETS = {TPU: "v5e-1", "NVIDIA H100 (not present)": "h100"}


class Unavailable(RuntimeError):
    """The target cannot be compiled for here, and why."""


def prepare():
    """Keeps JAX from taking a compiler for a chip of this machine; call it before JAX is imported.

    libtpu and JAX's CUDA plugin are looked up wherever they are installed, chip or not.
    """
    is_there = lambda module: importlib.util.find_spec(module) is not None
    chips = any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0", "/dev/nvidia0")))
    if not chips and (is_there("libtpu") or is_there("jax_plugins")):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def compiler(name: str = TPU) -> Callable:
    """Returns `compile_temp(fn, *abstract)` for one absent chip.

    Args:
      name: One of `TARGETS`.

    Raises:
      Unavailable: The chip's compiler is not installed.
    """
    from jaxckpt.absent import launch
    from jaxckpt.memory.measure import measure
    from jaxckpt.targets import target

    try:
        launch.check_available(target.parse_target(TARGETS[name]))
    except launch.Unavailable as error:
        raise Unavailable(str(error)) from error

    def compile_temp(fn, *args):
        report = measure(fn, *args, target=TARGETS[name])
        return report.temp_bytes if report.fits else None

    return compile_temp
