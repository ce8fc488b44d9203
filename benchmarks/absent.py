"""A TPU that is not there, as a compile target: `jaxckpt.measure` needs no chip."""

import importlib.util
import os
from collections.abc import Callable

TPU = "TPU v5e (not present)"
TARGET = "v5e-1"


class Unavailable(RuntimeError):
    """The target cannot be compiled for here, and why."""


def prepare():
    """Keeps JAX from taking libtpu for a chip of this machine; call it before JAX is imported."""
    is_there = lambda module: importlib.util.find_spec(module) is not None
    if is_there("libtpu") and not is_there("jax_plugins") and not os.path.exists("/dev/accel0"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def tpu() -> Callable:
    """Returns `compile_temp(fn, *abstract)` for one chip of an absent TPU v5e.

    Raises:
      Unavailable: libtpu is not installed.
    """
    from jaxckpt.memory import launch, targets
    from jaxckpt.memory.measure import measure

    try:
        launch.check_available(targets.parse_target(TARGET))
    except launch.Unavailable as error:
        raise Unavailable(str(error)) from error

    def compile_temp(fn, *args):
        report = measure(fn, *args, target=TARGET)
        return report.temp_bytes if report.fits else None

    return compile_temp
