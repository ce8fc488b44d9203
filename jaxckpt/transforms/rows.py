"""Rows of stacked arrays: parameters that blocks read, slots for carries, stacked residuals.

**Parameters.** A loop reads each block's row as it comes to it. Unrolled, the rows are values of
the program: XLA finds that the backward pass reads the same ones and keeps every row of the forward
pass until then, a second copy of all parameters. `read_inside` moves the reading into the
checkpointed block, behind its barrier, so that a row is read when it is used, and again when the
block is run again. So is what the block makes of its row alone, such as a cast to bfloat16.

**Slots** hold the carries that a schedule keeps, in arrays with a row a slot. A carry is a list of
leaves, and so are its slots. What is in a slot before it is written is never read. On the host they
are in pinned memory; a carry crosses the link when it is stored or loaded. Random keys stay on the
device: JAX forgets where an array of them is.

**Layout.** On a GPU a row of stacked residuals lies in memory as it is written. XLA chooses the
layout of every array in a loop by the operations that read it. An attention kernel made of matmuls
wants its operands transposed, and so XLA for GPUs transposes the whole stack of them at once before
the loop that reads it: a second copy of what was kept, 9.6 GiB of 26 for Qwen3-0.6B's block at 7
blocks of 32 x 1024 tokens. Rows pinned to the order they are written in are transposed one at a
time instead.

TPUs lay arrays out in tiles, and choose better without advice; CPUs copy nothing here.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.layout import Layout, with_layout_constraint
from jax.interpreters import batching

from jaxckpt.plans import Plan
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms.custom_gradient import reverse_only
from jaxckpt.transforms.policies import plan_and_policy
from jaxckpt.transforms.traced_block import zeros

_NO_TANGENTS = (
    "offload:carry of a schedule has no forward mode over reverse mode (jax.hessian); the schedule "
    "without it has, and so has full+offload:carry"
)


def reads_inside(remat: str | Plan | Schedule | Callable, unroll: int) -> bool:
    """Returns whether every block of a stack is one that reads its own row."""
    if unroll == 1 or isinstance(remat, Schedule):
        return False
    return all(stage.schedule == "full" for stage in plan_and_policy(remat)[0].stages)


def read_inside(apply: Callable, items, whole, start: int):
    """Returns `apply` of `(params_i, index)`, which reads the floating rows, and the items for it.

    Args:
      apply: `(carry, params_i) -> carry`.
      items: The parameters of the blocks that are run; their gradients go to the rows, as ever.
      whole: Those of the stack that the blocks are a part of, so that no copy of a part is made.
      start: The place of the first of the blocks in it.
    """
    # The rows' values are not read, so they cost nothing: they are where the gradient goes.
    stacked = jax.tree.map(lax.stop_gradient, whole)

    def reading(carry, item):
        params_i, index = item
        return apply(carry, jax.tree.map(lambda x, x_i: _row(x, x_i, index), stacked, params_i))

    count = jax.typeof(jax.tree.leaves(items)[0]).shape[0]
    return reading, (items, jnp.arange(start, start + count))


def _row(stacked, row, index):
    return _read(stacked, row, index) if jnp.issubdtype(stacked.dtype, jnp.inexact) else row


@jax.custom_jvp
def _read(stacked, row, index):
    """Returns `stacked[index]`, whose derivative is that of `row`."""
    return lax.dynamic_index_in_dim(stacked, index, keepdims=False)


@_read.defjvp
def _read_jvp(primals, tangents):
    return _read(*primals), tangents[1]


def empty(carry, count: int, *, on_host: bool) -> list:
    """Returns `count` slots for carries like `carry`."""
    return [_on_host(x, count) if on_host else _on_device(x, count) for x in carry]


def store(slots, slot, carry, *, on_host: bool) -> list:
    """Returns the slots with a carry in one of them."""
    if on_host:
        # JAX makes the tangents of slots on the device, whatever is stored there later.
        carry = [reverse_only(x, _NO_TANGENTS, at_once=True) for x in carry]
        carry = _moved(carry, jax.memory.Space.Host)
    return write(slots, slot, carry)


def load(slots, slot, *, on_host: bool) -> list:
    """Returns the carry in a slot, on the device."""
    carry = row(slots, slot)
    return _moved(carry, jax.memory.Space.Device) if on_host else carry


def row(leaves, index) -> list:
    """Returns one row of every leaf."""
    return [_read_at(0, x)(x, index) for x in leaves]


def write(leaves, index, rows) -> list:
    """Returns the leaves with one row of each replaced."""
    return [_write_at(0, x)(x, row, index) for x, row in zip(leaves, rows, strict=True)]


def _read_at(axis: int, x) -> Callable:
    """Returns `read(x, index)`, which reads a row of `x` along an axis."""
    read = lambda x, index: lax.dynamic_index_in_dim(x, index, axis, keepdims=False)
    if not _is_on_host(x):
        return read
    # Batched, JAX's own is a gather, which takes no array on the host with an index that is not.
    read = custom_vmap(read)

    @read.def_vmap
    def _(_, is_batched, x, index):
        assert not is_batched[1]
        return _read_at(axis + 1, x)(x, index), True

    return read


def _write_at(axis: int, x) -> Callable:
    """Returns `write(x, row, index)`, which writes a row of `x` along an axis."""
    write = lambda x, row, index: lax.dynamic_update_index_in_dim(x, row, index, axis)
    if not _is_on_host(x):
        return write
    write = custom_vmap(write)

    @write.def_vmap
    def _(size, is_batched, x, row, index):
        assert not is_batched[2]
        mesh_axis = jax.typeof(x if is_batched[0] else row).sharding.spec[0]
        widen = lambda leaf: batching.broadcast(leaf, size, 0, mesh_axis)
        x, row = x if is_batched[0] else widen(x), row if is_batched[1] else widen(row)
        return _write_at(axis + 1, x)(x, row, index), True

    return write


def _is_on_host(x) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _on_device(x, count: int):
    # Copies of the input rather than zeros: right for key dtypes and for any sharding.
    return lax.broadcast(x, (count,))


def _on_host(x, count: int):
    """Returns rows like `x` on the host; of keys and of nothing, where `_moved` leaves them."""
    if not x.size or _is_key(x):
        (rows,) = _moved([_on_device(x, count)], jax.memory.Space.Host)
        return rows
    return zeros(count, jax.typeof(x).update(memory_space=jax.memory.Space.Host))


def _moved(leaves, space) -> list:
    return [x if _is_key(x) else jax.device_put(x, space) for x in leaves]


def _is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.extended)


def row_major(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the same arrays; compiled for a GPU, last axis fastest."""
    pinned = lambda leaves: [_pin(leaf) for leaf in leaves]
    return lax.platform_dependent(list(leaves), cuda=pinned, rocm=pinned, default=lambda x: x)


def _pin(x: jax.Array) -> jax.Array:
    if x.ndim < 2 or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
