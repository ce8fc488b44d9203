"""A TPU that is not there, as a compile target: libtpu compiles for it on any machine.

libtpu takes a lock of the machine, reads its environment when it is loaded, and prints banners.
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable

TPU = "TPU v5e (not present)"
TOPOLOGY = "v5e:2x2"  # compiled for one of its chips

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Unavailable(RuntimeError):
    """The target cannot be compiled for here, and why."""


def prepare():
    """Sets what libtpu reads from the environment; call it before JAX is imported."""
    if importlib.util.find_spec("libtpu") is None or os.path.exists("/dev/accel0"):
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("jax_plugins") is None:  # else a GPU may be the local backend
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def tpu() -> Callable:
    """Returns `compile_temp(fn, *abstract)` for one chip of an absent TPU v5e.

    Raises:
      Unavailable: libtpu is not installed, or refuses the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise Unavailable("libtpu is not installed (pip install libtpu)")
    import jax
    from jax.experimental import topologies

    try:
        with _quiet():
            topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY)
    except Exception as error:  # whatever the plugin raises, the other targets are still measured
        raise Unavailable(" ".join(str(error).split())) from error
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def compile_temp(fn, *args):
        args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in args]
        lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",))
        try:
            with _quiet():
                stats = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                return None
            raise
        # Temporaries can read less than what the compiler's own peak leaves to them.
        outside = stats.argument_size_in_bytes + stats.output_size_in_bytes
        outside -= stats.alias_size_in_bytes
        return max(stats.temp_size_in_bytes, stats.peak_memory_in_bytes - outside)

    return compile_temp


@contextlib.contextmanager
def _quiet():
    """Sends file descriptor 2 to nowhere: libtpu's banners are not written by Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
