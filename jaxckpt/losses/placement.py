"""Where a loss head's arrays lie on a mesh whose devices share tokens and vocabulary.

A matrix product cannot be cut over one mesh axis twice. Where parameters are cut over the axis that
the batch is cut over (FSDP), either the weights are gathered, all of them, and their gradient is
whole on every device for a while, or the tokens are gathered, a chunk at a time, and the vocabulary
is spread over the axis. This is the second way: no array of the weights' size is ever whole.
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
      shards: Over which tokens are cut, in shards that sum their own gradients of the weights.
      rows: Over which a shard's rows are cut; inside a chunk they are gathered over it.
      vocabulary: Over which the vocabulary is spread inside the head.
    """

    mesh: AbstractMesh | Mesh
    shards: str
    rows: str
    vocabulary: tuple[str, ...]

    @property
    def num_shards(self) -> int:
        """Devices along the axis of shards."""
        return self.mesh.shape[self.shards]

    def weights(self, w, width_axis: int, lead: tuple[str | None, ...] = ()):
        """Returns the weights, or their gradient, spread over the vocabulary.

        Args:
          w: `[*lead, D, V]` or `[*lead, V, D]`.
          width_axis: Which of the last two is D.
          lead: Mesh axes of the axes before.
        """
        axes = (None, self.vocabulary) if width_axis == 0 else (self.vocabulary, None)
        return self._constrain(w, *lead, *axes)

    def tokens(self, x, *, sharded: bool, gathered: bool):
        """Returns an array of tokens, `[rows, ...]` or, `sharded`, `[shards, rows, ...]`."""
        lead = (self.shards,) if sharded else ()
        return self._constrain(x, *lead, *(() if gathered else (self.rows,)))

    def _constrain(self, x, *axes: Any):
        inside = jax.sharding.get_abstract_mesh()  # where Explicit axes are Auto
        mesh = inside if inside.shape == self.mesh.shape else self.mesh
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.lax.with_sharding_constraint(x, sharding)


def explicit_as_auto(call: Callable, arrays: Sequence[jax.Array], gradients_of: Sequence) -> Any:
    """Returns `call(*arrays)`: a number, and gradients sharded as arrays are.

    Every product here may meet a sharding that Explicit axes of a mesh leave to the program to
    choose. Inside the call they are Auto axes, so that the compiler chooses, as on other meshes.

    Args:
      call: Returns `(number, gradients)`.
      arrays: What it reads.
      gradients_of: The arrays, one for each gradient.
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
