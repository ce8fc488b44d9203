"""A stack of a step as data for the planner: found by tracing the step (`places.py`), or given.

A block becomes a closed function of abstract leaves immediately, while the tracers that it closes
over are still alive.
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
      call: `call(carry, params_i, consts) -> [*carry, *ys]`; every argument and the result are
        lists of leaves.
      carry: The leaves of the block's input.
      params: The leaves of all blocks' parameters, `[L, ...]`.
      consts: Leaves that all blocks share, including arrays that the block closed over.
      num_blocks: The number of blocks, L.
      unroll: The number of blocks unrolled in one trip of the loop.
      region: The function under `checkpoint`, which is a stack of one block without parameters, or
        a chain; else None.
      ends: For a chain, the number of the region's steps before each block, and the number of all
        steps; else empty.
      mesh: The mesh around the stack; its Manual axes are the axes of a `jax.shard_map`.
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
        """A key that is equal for stacks with equal numbers of blocks, shapes and dtypes."""
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
        """Returns the stack of a block.

        Args:
          block: The traced block.
          params: A pytree of leaves `[L, ...]`, arrays or abstract.
          num_blocks: The number of blocks, L.
          unroll: The number of blocks unrolled in one trip of the loop.
          is_region: Whether the block is a function under `checkpoint` or a chain.
          ends: As for the attribute `ends`.
          mesh: As for the attribute `mesh`.
        """
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
    """Returns `fn()`, called inside a `jax.shard_map` if the stacks' blocks ran inside one.

    Such blocks use named axes, so they can be traced again only inside a `jax.shard_map`.

    Args:
      stacks: The stacks whose blocks `fn` traces.
      fn: A function without arguments.
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
    """Returns the stack of `(block, params_i, carry, *consts)`, the arguments of `jaxckpt.explain`.

    Args:
      block: A tuple or list of these values.
      num_blocks: The number of blocks, L.
      name: The name of the argument in errors.

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
