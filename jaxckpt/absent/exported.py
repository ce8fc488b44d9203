"""Packs a user's function for another process by `jax.export`, as bytes and JSON, without pickle.

The other process compiles the program for the target, with the same donations and argument
shardings (`memory/worker.py`). A function that cannot be exported raises an error of one line. The
user can then build the step in the other process by an `Entry` (`jobs.py`).

Shardings are sent as JSON, because only the other process has the devices. A `NamedSharding` is
sent as its mesh's axis names and sizes and its partition spec, and the other process makes the
mesh. The mesh in this process may consist of devices, or be a `jax.sharding.AbstractMesh`. With any
other sharding, each device holds the whole array.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxckpt.costs.flops import count_flops
from jaxckpt.plans.errors import UserError
from jaxckpt.targets.target import Target

# Source locations, as references and in a table. A digest leaves them out, so that equal programs
# from different lines of code have one digest.
_STRING = r'"(?:[^"\\]|\\.)*"'
_LOCATION = re.compile(
    rf'^#loc.*\n|\s*\bloc\((?:{_STRING}|[^()"]|\((?:{_STRING}|[^()"])*\))*\)', re.MULTILINE
)
_CUSTOM_CALL = re.compile(r"custom_call @([\w.$]+)\(")


class TravelError(RuntimeError):
    """A function cannot be sent to the process that compiles: one line, with another way."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traveler:
    """A function in a form that another process can read.

    Attributes:
      program: The exported function, in `jax.export`'s format.
      text: The lowered module as text, without source locations.
      names: The path of each flat argument, such as `args[0].params['w']`.
      donated: For each flat argument, whether outputs may reuse the argument's memory.
      placement: The arguments' shardings, from `describe`.
      flops: The FLOPs of one call.
    """

    program: bytes
    text: str
    names: tuple[str, ...]
    donated: tuple[bool, ...]
    placement: dict[str, Any]
    flops: int

    def digest(self) -> str:
        """Returns a digest of what the compiled program depends on, except the target."""
        rest = json.dumps([self.text, self.donated, self.placement], sort_keys=True)
        return hashlib.sha256(rest.encode()).hexdigest()


def pack(jitted, args: Sequence[Any], platform: str) -> Traveler:
    """Returns a jitted function and its abstract arguments, ready to be sent to another process.

    Args:
      jitted: A result of `jax.jit`, with its donations and static arguments.
      args: Arrays, abstract values, or values of static arguments.
      platform: `"tpu"` or `"cuda"`.

    Raises:
      TravelError: The function cannot be exported.
      PlacementError: Arguments are sharded over several meshes.
    """
    try:
        traced = trace(jitted, args)
    except RuntimeError as error:
        # Tracing cuDNN's attention looks for cuDNN, which a process of another backend lacks.
        raise (TravelError(_advice(error)) if "cuDNN" in str(error) else error) from error
    infos = jax.tree.leaves(traced.args_info, is_leaf=lambda x: hasattr(x, "donated"))
    try:
        exported = _export(traced, platform)
        program = bytes(_without_structure(exported).serialize(vjp_order=0))
    except Exception as error:  # the exporter and kernels may raise anything
        raise TravelError(_advice(error)) from error
    leaves = _leaves(args, exported.in_avals)
    return Traveler(
        program=program,
        text=_LOCATION.sub("", exported.mlir_module()),
        names=tuple(path for path, _ in leaves),
        donated=tuple(bool(info.donated) for info in infos),
        placement=describe([getattr(leaf, "sharding", None) for _, leaf in leaves]),
        flops=count_flops(traced.jaxpr),
    )


def trace(jitted, args: Sequence[Any]):
    """Returns the trace of a jitted function.

    Args:
      jitted: A result of `jax.jit` or `nnx.jit`.
      args: The arguments.
    """
    traced = jitted.trace(*args)
    return traced if hasattr(traced, "jaxpr") else traced.traced


def has_nnx(args: Sequence[Any]) -> bool:
    """Returns whether the arguments contain an NNX module, variable or optimizer."""
    return any(map(_is_nnx, jax.tree.leaves(tuple(args), is_leaf=_is_nnx)))


def _is_nnx(value) -> bool:
    nnx: Any = sys.modules.get("flax.nnx")  # imported already if a user made an NNX argument
    return nnx is not None and isinstance(value, nnx.Pytree | nnx.Variable)


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A traced function in the form that `jax.export` takes, which traces a jitted function.

    The exported program has flat arguments and results. A result of `nnx.jit` cannot be exported,
    but its trace can be exported.
    """

    traced: Any

    def trace(self):
        return self.traced

    def lower(self):
        return self.traced.lower()

    def __call__(self, *args):
        return self.traced(*args)


def _export(traced, platform: str) -> export.Exported:
    """Returns the exported function; it may call any kernels.

    `jax.export` refuses kernels that may change between versions. Both processes have the same
    versions, so the check is turned off for the kernels that the refusal names.
    """
    checks = [export.DisabledSafetyCheck.platform()]
    made: Any = _Traced(traced)
    go = lambda: export.export(made, platforms=(platform,), disabled_checks=checks)()
    try:
        return go()
    except ValueError as error:
        names = sorted(set(_CUSTOM_CALL.findall(str(error))))
        if not names:
            raise
        checks += [export.DisabledSafetyCheck.custom_call(name) for name in names]
    return go()


def _leaves(args: Sequence[Any], avals: Sequence[Any]) -> list[tuple[str, Any]]:
    """Returns the path and the leaf of each flat argument, skipping leaves of static arguments."""
    leaves = iter(_all_leaves(args))
    matching = lambda aval: (one for one in leaves if np.shape(one[1]) == aval.shape)
    return [next(matching(aval), ("an argument", None)) for aval in avals]


def _all_leaves(args: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yields the paths and leaves of arguments in the order in which they are traced.

    `nnx.jit` takes a variable once, at its first place.
    """
    with_path = functools.partial(jax.tree_util.tree_leaves_with_path, is_leaf=_is_nnx)
    found = [(f"args{jax.tree_util.keystr(path)}", leaf) for path, leaf in with_path(tuple(args))]
    nodes = [leaf for _, leaf in found if _is_nnx(leaf)]
    states = sys.modules["flax.nnx"].split(nodes)[1] if nodes else {}
    number = itertools.count()
    for path, leaf in found:
        if not _is_nnx(leaf):
            yield path, leaf
            continue
        for inner, array in jax.tree_util.tree_leaves_with_path(states.get(next(number))):
            yield f"{path}{jax.tree_util.keystr(inner).removesuffix('.value')}", array


def _without_structure(exported: export.Exported) -> export.Exported:
    """Returns the function with flat arguments and results: trees of classes do not serialize."""
    inputs = jax.tree.structure((tuple(range(len(exported.in_avals))), {}))
    outputs = jax.tree.structure(tuple(range(len(exported.out_avals))))
    return dataclasses.replace(exported, in_tree=inputs, out_tree=outputs)


def _advice(error: Exception) -> str:
    """Returns one line: why the export failed, and the advice to use an `Entry`."""
    first = " ".join(str(error).split())[:300]
    return (
        f"the function cannot be handed to the process that compiles ({first}); build it there: "
        "jaxckpt.absent.jobs.measure_entry(Entry(function='package.module:function'), target)"
    )


class PlacementError(UserError, ValueError):
    """Shardings of arguments do not fit one another or the target: one line."""


def describe(shardings: Sequence[Any]) -> dict[str, Any]:
    """Returns shardings as JSON values: one mesh, and a spec and memory kind for each sharding.

    Args:
      shardings: The sharding of each argument; None for an argument without a sharding.

    Raises:
      PlacementError: The shardings are over several meshes.
    """
    meshes, arguments = set(), []
    for sharding in shardings:
        spec = None
        if isinstance(sharding, NamedSharding):
            meshes.add(tuple(sharding.mesh.shape.items()))
            spec = [list(entry) if isinstance(entry, tuple) else entry for entry in sharding.spec]
            for entry in spec:
                if not isinstance(entry, str | list | None):
                    raise PlacementError(
                        f"partition spec entry {entry!r} cannot be compiled for an absent target"
                    )
        kind = getattr(sharding, "memory_kind", None)
        # Backends name memory kinds differently. Only pinned_host exists on CPU, GPU and TPU.
        kind = kind if kind == "pinned_host" else None
        arguments.append({"spec": spec, "memory_kind": kind})
    if len(meshes) > 1:
        found = " and ".join(str(dict(mesh)) for mesh in sorted(meshes))
        raise PlacementError(f"arguments are sharded over {found}; one mesh can be compiled for")
    mesh = [list(axis) for axis in meshes.pop()] if meshes else []
    return {"mesh": mesh, "arguments": arguments}


def rebuild(described: dict[str, Any], topology, target: Target, num_devices: int = 1) -> list:
    """Returns the shardings that `describe` described, on the devices of the target's topology.

    Args:
      described: The result of `describe`.
      topology: JAX's topology of the target.
      target: The target.
      num_devices: The number of devices that the program was traced for. If it is above 1 and no
        mesh is described, the devices form a mesh of one axis.

    Raises:
      PlacementError: The mesh does not have the target's number of devices.
    """
    axes = described["mesh"] or ([["devices", num_devices]] if num_devices > 1 else [])
    if not axes:
        device = topology.devices[0]
        single = lambda kind: SingleDeviceSharding(device, memory_kind=kind)
        return [single(one["memory_kind"]) for one in described["arguments"]]
    names, sizes = zip(*axes, strict=True)
    count = math.prod(sizes)
    if count != target.num_devices:
        shape = ", ".join(f"{name}: {size}" for name, size in axes)
        raise PlacementError(
            f"the step is sharded over {count} devices ({shape}); "
            f"target {target} has {target.num_devices}"
        )
    # `make_mesh` works as for present devices: it may map an axis of the mesh to several axes of a
    # torus, or to a part of one axis.
    types = (AxisType.Auto,) * len(names)
    mesh = jax.make_mesh(sizes, names, axis_types=types, devices=topology.devices)
    entry = lambda names: tuple(names) if isinstance(names, list) else names
    spec = lambda entries: PartitionSpec(*map(entry, entries or ()))
    return [
        NamedSharding(mesh, spec(one["spec"]), memory_kind=one["memory_kind"])
        for one in described["arguments"]
    ]
