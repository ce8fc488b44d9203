"""Where a Transformer's arrays lie on a mesh: rules for its parameters, activations and loss head.

    layout = Layout(MeshShape.parse("data=2,fsdp=4"))
    model = Transformer(config, remat="sqrt", layout=layout)
    shardings = layout.of_params(params, mesh)     # mesh = jax.make_mesh(...), with the same axes

XLA's partitioner does the rest: constraints are made where it would have a choice. A block's
matrices lie in shards and are gathered over `fsdp` where a product needs them, in the block and
nowhere else. The residual stream is cut over the batch alone; between its projections a branch is
cut over `tensor` too. The embedding table is never gathered: tokens are looked up in every shard of
its columns, and the loss head spreads the vocabulary over `fsdp` as well (`losses.placement`).

Constraints name an `AbstractMesh`: the devices are those of the arguments, which may be absent.
Axes are `Auto`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxckpt.losses.placement import Placement
from jaxckpt.models.mesh import AXES, MeshShape

_BATCH = ("data", "fsdp")
AXIS_TYPES = (AxisType.Auto,) * len(AXES)

# The last parts of a parameter's path, and the mesh axes of its last two axes.
_RULES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("embed_tokens", "embedding"): ("tensor", "fsdp"),
    ("lm_head", "kernel"): ("fsdp", "tensor"),
    ("q_proj", "kernel"): ("fsdp", "tensor"),
    ("k_proj", "kernel"): ("fsdp", "tensor"),
    ("v_proj", "kernel"): ("fsdp", "tensor"),
    ("o_proj", "kernel"): ("tensor", "fsdp"),
    ("gate_proj", "kernel"): ("fsdp", "tensor"),
    ("up_proj", "kernel"): ("fsdp", "tensor"),
    ("down_proj", "kernel"): ("tensor", "fsdp"),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The rules on one mesh.

    Attributes:
      shape: Sizes of the mesh's axes.
    """

    shape: MeshShape

    @functools.cached_property
    def mesh(self) -> AbstractMesh:
        """The mesh without its devices."""
        return AbstractMesh(self.shape.sizes, AXES, axis_types=AXIS_TYPES)

    def spec_of(self, path: tuple[str, ...], ndim: int) -> PartitionSpec:
        """Returns how a parameter, or what an optimizer keeps for it, is cut: by its path.

        Vectors are whole on every device: the scales of norms, and the sums over rows or columns
        that a factored optimizer keeps for a matrix.
        """
        stacked = int("layers" in path)
        axes = _RULES.get(path[-2:], ())
        if ndim != stacked + len(axes):
            return PartitionSpec()
        return PartitionSpec(*[None] * stacked, *axes)

    def of_params(self, params, mesh=None):
        """Returns a tree of shardings like a tree of parameters, abstract ones too.

        Args:
          params: Dictionaries, as Flax has them.
          mesh: Devices with this layout's axes; by default the mesh without devices.
        """
        sharding = functools.partial(NamedSharding, self.mesh if mesh is None else mesh)

        def one(path, leaf):
            names = tuple(str(getattr(key, "key", key)) for key in path)
            return sharding(self.spec_of(names, leaf.ndim))

        return jax.tree_util.tree_map_with_path(one, params)

    def of_batch(self, mesh=None) -> NamedSharding:
        """Returns the sharding of tokens `[B, S]`."""
        return NamedSharding(self.mesh if mesh is None else mesh, PartitionSpec(_BATCH))

    def constrain(self, x, *axes: Any):
        """Returns `x` cut over mesh axes, one entry for each of its leading axes."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))

    def stream(self, x_BSD):
        """Returns the residual stream, cut over the batch."""
        return self.constrain(x_BSD, _BATCH)

    def parts(self, tokens_PBS):
        """Returns the parts of a batch, each cut over the batch's axes."""
        return self.constrain(tokens_PBS, None, _BATCH)

    def look_up(self, table_VD, tokens_BS):
        """Returns the table's rows of tokens, cut over the batch.

        Every shard of the table's columns looks all tokens of its group up, then rows for columns
        are exchanged.
        """
        table_VD = self.constrain(table_VD, *_RULES["embed_tokens", "embedding"])
        rows_BSD = jnp.take(table_VD, self.constrain(tokens_BS, "data"), axis=0)
        return self.stream(self.constrain(rows_BSD, "data", None, "fsdp"))

    def head(self) -> Placement:
        """Returns how the loss head's arrays lie."""
        return Placement(mesh=self.mesh, shards="data", rows="fsdp", vocabulary=("tensor", "fsdp"))

    def attend(self, kernel: Callable, q_BSHN, k_BSKN, v_BSKN, segment_ids_BS):
        """Runs an attention kernel on each device's own sequences and heads.

        XLA does not look into a kernel: left to itself it would gather what the kernel is given.
        """
        heads = PartitionSpec(_BATCH, None, "tensor")
        given, specs = (q_BSHN, k_BSKN, v_BSKN), (heads,) * 3
        if segment_ids_BS is not None:
            given, specs = (*given, segment_ids_BS), (*specs, PartitionSpec(_BATCH))
        call = lambda q, k, v, ids=None: kernel(q, k, v, ids)
        # Kernels say nothing of how their results vary over the mesh.
        spread = {"mesh": self.mesh, "in_specs": specs, "out_specs": heads, "check_vma": False}
        return jax.shard_map(call, **spread)(*given)
