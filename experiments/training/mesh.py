"""The mesh of a run, and the shardings of its state and batches.

    mesh = make_mesh(config)             # None without --mesh
    state = abstract_state(config, mesh)

Paths in the optimizer's state end with the parameters' paths, so a parameter's rule shards its
optimizer state too.
"""

import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from experiments.config import ConfigError, TrainConfig
from experiments.training.step import TrainState, init_state, layout_of
from jaxckpt.models.mesh import AXES
from jaxckpt.models.sharding import AXIS_TYPES
from jaxckpt.transforms.traced_block import on_devices


def put_whole(arrays, where: jax.sharding.Sharding | None):
    """Returns arrays, of which every process has all values, with a sharding."""
    if where is None:
        return arrays
    put = lambda x: jax.make_array_from_callback(x.shape, where, lambda index: x[index])
    return jax.tree.map(put, arrays)


def make_mesh(config: TrainConfig) -> Mesh | None:
    """Returns the mesh of this run's devices, or None without one.

    Raises:
      ConfigError: The mesh has more devices than the run; or fewer, in a run of several processes.
    """
    shape = config.mesh_shape
    if shape is None:
        return None
    devices = jax.devices()
    if shape.size > len(devices) or (shape.size < len(devices) and jax.process_count() > 1):
        them = f"{len(devices)} device{'s' * (len(devices) > 1)}"
        count = f"--xla_force_host_platform_device_count={shape.size}"
        cure = f"; XLA_FLAGS={count} makes a CPU as many" * (jax.default_backend() == "cpu")
        raise ConfigError(f"mesh {shape} is of {shape.size} devices; this run has {them}{cure}")
    return jax.make_mesh(shape.sizes, AXES, axis_types=AXIS_TYPES, devices=devices[: shape.size])


def batch_sharding(config: TrainConfig) -> NamedSharding | None:
    """Returns the sharding of a batch on this run's devices; None without a mesh."""
    layout = layout_of(config)
    return None if layout is None else layout.of_batch(make_mesh(config))


def abstract_state(config: TrainConfig, mesh: Mesh | None = None) -> TrainState:
    """Returns the shapes of a run's state, with shardings if it has a mesh.

    Args:
      config: A configuration whose model is resolved.
      mesh: From `make_mesh`; an abstract one where the devices are absent.
    """
    state = jax.eval_shape(functools.partial(init_state, config))
    layout = layout_of(config)
    if layout is None:
        return state
    shardings = layout.of_params(state, mesh)
    return jax.tree.map(on_devices, state, shardings)


def abstract_tokens(config: TrainConfig, mesh: Mesh | None = None) -> jax.ShapeDtypeStruct:
    """Returns the shape of a step's tokens, with their sharding if the run has a mesh."""
    layout = layout_of(config)
    where: dict[str, Any] = {} if layout is None else {"sharding": layout.of_batch(mesh)}
    return jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), "int32", **where)
