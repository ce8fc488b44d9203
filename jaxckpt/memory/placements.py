"""Where arguments live, as JSON: shardings over devices that another process will have.

A `NamedSharding` is its mesh's axis names and sizes and its partition spec; the process that has
the devices makes the mesh again. The mesh here may be of devices that this process has or a
`jax.sharding.AbstractMesh`. Every other sharding is taken as: whole, on each device.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxckpt.memory.targets import Target
from jaxckpt.plans.errors import UserError


class PlacementError(UserError, ValueError):
    """Arguments whose shardings do not fit one another or the target: one line."""


def describe(shardings: Sequence[Any]) -> dict[str, Any]:
    """Returns shardings as JSON values: one mesh, and a spec and memory kind for each.

    Raises:
      PlacementError: They are over several meshes.
    """
    named = [sharding for sharding in shardings if isinstance(sharding, NamedSharding)]
    meshes = {tuple(sharding.mesh.shape.items()) for sharding in named}
    if len(meshes) > 1:
        found = " and ".join(str(dict(mesh)) for mesh in sorted(meshes))
        raise PlacementError(f"arguments are sharded over {found}; one mesh can be compiled for")
    mesh = [list(axis) for axis in meshes.pop()] if meshes else []
    return {"mesh": mesh, "arguments": [_describe_one(sharding) for sharding in shardings]}


def _describe_one(sharding: Any) -> dict[str, Any]:
    is_named = isinstance(sharding, NamedSharding)
    spec = [_entry(entry) for entry in sharding.spec] if is_named else None
    kind = getattr(sharding, "memory_kind", None)
    # Kinds are named by backend; only the host's name is the same on a CPU, a GPU and a TPU.
    return {"spec": spec, "memory_kind": kind if kind == "pinned_host" else None}


def _entry(entry: Any) -> Any:
    if entry is None or isinstance(entry, str):
        return entry
    if isinstance(entry, tuple):
        return list(entry)
    raise PlacementError(f"partition spec entry {entry!r} cannot be compiled for an absent target")


def rebuild(described: dict[str, Any], topology, target: Target, num_devices: int = 1) -> list:
    """Returns the shardings that `describe` described, on the devices of a topology.

    Without a mesh one device stands for all: each holds the same.

    Args:
      described: What `describe` returned.
      topology: The target's.
      target: Named in errors.
      num_devices: Devices that the program was traced for; 1 if it names none.

    Raises:
      PlacementError: The mesh does not have the target's number of devices.
    """
    axes = described["mesh"] or ([["devices", num_devices]] if num_devices > 1 else [])
    if not axes:
        device = topology.devices[0]
        single = lambda kind: SingleDeviceSharding(device, memory_kind=kind)
        return [single(one["memory_kind"]) for one in described["arguments"]]
    mesh = _mesh(axes, topology, target)
    return [
        NamedSharding(mesh, _spec(one["spec"]), memory_kind=one["memory_kind"])
        for one in described["arguments"]
    ]


def _mesh(axes: list, topology, target: Target):
    names, sizes = zip(*axes, strict=True)
    count = math.prod(sizes)
    if count != target.num_devices:
        shape = ", ".join(f"{name}: {size}" for name, size in axes)
        raise PlacementError(
            f"the step is sharded over {count} devices ({shape}); "
            f"target {target} has {target.num_devices}"
        )
    # As a run does with devices that are there: an axis may be several of a torus, or part of one.
    types = (AxisType.Auto,) * len(names)
    return jax.make_mesh(sizes, names, axis_types=types, devices=topology.devices)


def _spec(entries: list | None) -> PartitionSpec:
    if entries is None:
        return PartitionSpec()
    return PartitionSpec(*(tuple(e) if isinstance(e, list) else e for e in entries))
