"""A stack of a step as data for the planner: found by tracing the step (`places.py`), or given.

A block becomes a closed function of abstract leaves at once, while the tracers that it closes over
are still alive.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from jaxckpt.transforms.traced_block import (
    TracedBlock,
    abstract,
    all_blocks,
    first_block,
    trace_block,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack as data for the planner: a pure block over lists of abstract leaves.

    Attributes:
      call: `call(carry, params_i, consts) -> [*carry, *ys]`, all of them lists of leaves.
      carry: The leaves of the block's input.
      params: Leaves `[L, ...]`.
      consts: Leaves that all blocks share, with arrays that the block closed over.
      num_blocks: The number of blocks, L.
      unroll: Blocks unrolled in one trip of its loop.
      region: The function under `checkpoint`, a stack of one block without parameters, or a chain;
        else None.
      ends: Of a chain, the steps of the region before each block, and all of them.
      mesh: The mesh around it; its Manual axes are those of a `jax.shard_map`.
    """

    call: Callable
    carry: list[Any]
    params: list[Any]
    consts: list[Any]
    num_blocks: int
    unroll: int = 1
    region: TracedBlock | None = None
    ends: tuple[int, ...] = ()
    mesh: AbstractMesh | None = None

    @property
    def params_i(self) -> list[Any]:
        """One block's parameters."""
        return first_block(self.params)

    @property
    def params_bytes(self) -> int:
        """Bytes of all blocks' parameters."""
        return sum(_nbytes(leaf) for leaf in self.params)

    @property
    def carry_bytes(self) -> int:
        """Bytes of a block's input."""
        return sum(_nbytes(leaf) for leaf in self.carry)

    @property
    def shape(self) -> tuple:
        """A key that is equal for stacks of the same number of blocks, shapes and dtypes."""
        text = lambda leaves: tuple((tuple(x.shape), str(x.dtype)) for x in leaves)
        return (self.num_blocks, text(self.carry), text(self.params), text(self.consts))

    @classmethod
    def of(
        cls,
        block: TracedBlock,
        params,
        num_blocks: int,
        unroll: int = 1,
        is_region: bool = False,
        ends: tuple[int, ...] = (),
        mesh: AbstractMesh | None = None,
    ) -> "Stack":
        """Returns the stack of a block; `params` are leaves `[L, ...]`, arrays or abstract."""
        carry, _, consts = block.inputs
        return cls(
            call=block.call,
            carry=carry,
            params=abstract(jax.tree.leaves(params)),
            consts=consts,
            num_blocks=num_blocks,
            unroll=unroll,
            region=block if is_region else None,
            ends=ends,
            mesh=mesh,
        )


def in_place(stacks: Sequence[Stack], fn: Callable[[], Any]):
    """Returns `fn()`, called where the named axes of the stacks' blocks are known.

    Blocks that ran inside of a `jax.shard_map` can be traced again only inside of one.
    """
    meshes = [stack.mesh for stack in stacks if stack.mesh is not None and stack.mesh.manual_axes]
    if not meshes:
        return fn()
    mesh, found = meshes[0], []
    names = set(mesh.manual_axes)
    outside = mesh.update_axis_types(dict.fromkeys(names, AxisType.Auto))

    def inside() -> tuple:
        found.append(fn())
        return ()

    mapped = jax.shard_map(inside, mesh=outside, in_specs=(), out_specs=(), axis_names=names)
    jax.eval_shape(mapped)
    return found[0]


def given_stack(block: Sequence, num_blocks: int, name: str = "block") -> Stack:
    """Returns the stack of `(block, params_i, carry, *consts)`, as `jaxckpt.explain` takes them.

    Raises:
      ValueError: `block` has another form.
    """
    if not isinstance(block, tuple | list) or len(block) < 3 or not callable(block[0]):
        raise ValueError(f"{name} is (block, params_i, carry, *consts), as for jaxckpt.explain")
    call, params_i, carry, *consts = block
    traced, _ = trace_block(call, carry, params_i, tuple(consts))
    return Stack.of(traced.only_changed(), all_blocks(params_i, num_blocks), num_blocks)


def _nbytes(leaf) -> int:
    return leaf.size * leaf.dtype.itemsize
