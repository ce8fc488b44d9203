"""Shardings of a loss head's arrays on a mesh whose devices share tokens and vocabulary.

A matrix product cannot be sharded over one mesh axis twice. FSDP shards parameters and batch over
the same axis. Then either all weights are gathered, and every device holds their whole gradient for
a while; or tokens are gathered, a chunk at a time, and the vocabulary is spread over the axis. This
is the second way: no device ever holds an array of the weights' size.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Mesh axes of a head's arrays; the mesh may be without devices.

    Attributes:
      mesh: The mesh, of `Auto` or `Explicit` axes.
      shards: The axis of token shards, each of which sums its own gradient of the weights.
      rows: The axis that a shard's rows are spread over; inside a chunk they are gathered.
      vocabulary: The axes that the vocabulary is spread over inside the head.
    """

    mesh: AbstractMesh | Mesh
    shards: str
    rows: str
    vocabulary: tuple[str, ...]

    @property
    def num_shards(self) -> int:
        """The number of devices along the axis of shards."""
        return self.mesh.shape[self.shards]

    def weights(self, w, width_axis: int, lead: tuple[str | None, ...] = ()):
        """Returns the weights `[*lead, D, V]`, or `[*lead, V, D]`, spread over the vocabulary.

        `width_axis` is the place of D in the last two axes; `lead` has the mesh axes of the others.
        """
        axes = (None, self.vocabulary) if width_axis == 0 else (self.vocabulary, None)
        return self._constrain(w, *lead, *axes)

    def tokens(self, x, *, sharded: bool, gathered: bool):
        """Returns an array of tokens, `[rows, ...]` or, `sharded`, `[shards, rows, ...]`."""
        lead = (self.shards,) if sharded else ()
        return self._constrain(x, *lead, *(() if gathered else (self.rows,)))

    def _constrain(self, x, *axes: Any):
        inside = jax.sharding.get_abstract_mesh()  # the mesh with Explicit axes as Auto
        mesh = inside if inside.shape == self.mesh.shape else self.mesh
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.lax.with_sharding_constraint(x, sharding)


def explicit_as_auto(call: Callable, arrays: Sequence[jax.Array], gradients_of: Sequence) -> Any:
    """Returns `call(*arrays)`, a number and gradients, with Explicit mesh axes as Auto inside.

    Explicit axes would need an output sharding at every product. With Auto axes the compiler
    chooses it. Each gradient gets the sharding of its array in `gradients_of`.
    """
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    mesh = next((mesh for mesh in meshes if not mesh.empty), jax.sharding.get_abstract_mesh())
    kinds = () if mesh.empty else zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    if not axes:
        return call(*arrays)
    specs = [PartitionSpec(), *(jax.typeof(array).sharding.spec for array in gradients_of)]
    number, *gradients = (NamedSharding(mesh, spec) for spec in specs)
    out = (number, tuple(gradients))
    return jax.sharding.auto_axes(call, axes=axes, out_sharding=out)(*arrays)
