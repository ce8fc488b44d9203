"""Shardings of a Transformer on a mesh: rules for its parameters, activations and loss head.

    layout = Layout(MeshShape.parse("data=2,fsdp=4"))
    model = Transformer(config, remat="sqrt", layout=layout)
    shardings = layout.of_params(params, mesh)     # mesh = jax.make_mesh(...), with the same axes

Constraints stand only where XLA's partitioner would have a choice. A block's matrices are sharded,
and gathered over `fsdp` only inside the block, where a product needs them. The residual stream is
sharded over the batch; between its projections a branch is sharded over `tensor` too. The embedding
table is never gathered: tokens are looked up in every shard of its columns, and the loss head
spreads the vocabulary over `fsdp` as well (`losses.placement`).

Constraints name an `AbstractMesh`. The devices come from the arguments and may be absent. Axes are
`Auto`.
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

# The end of a parameter's path -> the mesh axes of its last two axes.
_RULES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("embed_tokens", "embedding"): ("tensor", "fsdp"),
    ("o_proj", "kernel"): ("tensor", "fsdp"),
    ("down_proj", "kernel"): ("tensor", "fsdp"),
}
_INWARD = ("lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_RULES |= {(name, "kernel"): ("fsdp", "tensor") for name in _INWARD}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sharding rules on one mesh.

    Attributes:
      shape: The sizes of the mesh's axes.
    """

    shape: MeshShape

    @functools.cached_property
    def mesh(self) -> AbstractMesh:
        """The mesh without its devices."""
        return AbstractMesh(self.shape.sizes, AXES, axis_types=AXIS_TYPES)

    def spec_of(self, path: tuple[str, ...], ndim: int) -> PartitionSpec:
        """Returns the partition spec of a parameter, or of its optimizer state, by its path.

        Vectors are whole on every device: scales of norms, and a factored optimizer's sums over the
        rows or columns of a matrix.
        """
        stacked = int("layers" in path)
        axes = _RULES.get(path[-2:], ())
        if ndim != stacked + len(axes):
            return PartitionSpec()
        return PartitionSpec(*[None] * stacked, *axes)

    def of_params(self, params, mesh=None):
        """Returns the shardings of a tree of parameters, by default without devices."""
        sharding = functools.partial(NamedSharding, self.mesh if mesh is None else mesh)

        def one(path, leaf):
            names = tuple(str(getattr(key, "key", key)) for key in path)
            return sharding(self.spec_of(names, leaf.ndim))

        return jax.tree_util.tree_map_with_path(one, params)

    def of_batch(self, mesh=None) -> NamedSharding:
        """Returns the sharding of tokens `[B, S]`."""
        return NamedSharding(self.mesh if mesh is None else mesh, PartitionSpec(_BATCH))

    def constrain(self, x, *axes: Any):
        """Returns `x` sharded over mesh axes, one for each of its leading axes."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))

    def stream(self, x_BSD):
        """Returns the residual stream, sharded over the batch."""
        return self.constrain(x_BSD, _BATCH)

    def parts(self, tokens_PBS):
        """Returns the parts of an accumulated batch, each sharded over the batch's mesh axes."""
        return self.constrain(tokens_PBS, None, _BATCH)

    def look_up(self, table_VD, tokens_BS):
        """Returns the embeddings of tokens, sharded over the batch.

        Each device looks up all tokens of its group in its shard of the table's columns. Then the
        devices exchange rows for columns.
        """
        table_VD = self.constrain(table_VD, *_RULES["embed_tokens", "embedding"])
        rows_BSD = jnp.take(table_VD, self.constrain(tokens_BS, "data"), axis=0)
        return self.stream(self.constrain(rows_BSD, "data", None, "fsdp"))

    def head(self) -> Placement:
        """Returns the placement of the loss head's arrays."""
        return Placement(mesh=self.mesh, shards="data", rows="fsdp", vocabulary=("tensor", "fsdp"))

    def attend(self, kernel: Callable, q_BSHN, k_BSKN, v_BSKN, segment_ids_BS):
        """Runs an attention kernel on each device's own sequences and heads.

        XLA does not partition a kernel: without this it would gather the kernel's arguments.
        """
        heads = PartitionSpec(_BATCH, None, "tensor")
        given, specs = (q_BSHN, k_BSKN, v_BSKN), (heads,) * 3
        if segment_ids_BS is not None:
            given, specs = (*given, segment_ids_BS), (*specs, PartitionSpec(_BATCH))
        call = lambda q, k, v, ids=None: kernel(q, k, v, ids)
        # Kernels do not tell how their results vary over the mesh, so the check is off.
        spread = {"mesh": self.mesh, "in_specs": specs, "out_specs": heads, "check_vma": False}
        return jax.shard_map(call, **spread)(*given)
