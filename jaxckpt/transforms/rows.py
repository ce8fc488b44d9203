"""Rows of stacked arrays: parameters that blocks read, slots for carries, stacked residuals.

**Parameters.** A loop reads each block's row in turn. In an unrolled loop the rows are values of
the program: XLA sees that the backward pass reads the same rows, and keeps all of them from the
forward pass on. That is a second copy of all parameters. `read_inside` moves the reading into the
checkpointed block, behind its barrier. A row is then read when it is used, and once more when the
block is recomputed. A value that is computed from the row only, such as its cast, is recomputed
too.

**Slots** hold the carries that a schedule keeps, in arrays with one row per slot. A carry is a list
of leaves, and so are its slots. A slot is never read before it is written. On the host, slots are
in pinned memory; a carry crosses the link when it is stored or loaded. Random keys stay on the
device: JAX does not track the memory of key arrays.

**Layout.** XLA chooses the layout of every array in a loop by the operations that read it. An
attention kernel made of matmuls reads its operands transposed, so XLA for GPUs transposes their
whole stack at once before the loop: a second copy of the kept residuals, 9.6 GiB of 26 for
Qwen3-0.6B's block at 7 blocks of 32 x 1024 tokens. On a GPU `row_major` pins rows to the order in
which they are written; then they are transposed one at a time.

TPUs lay arrays out in tiles and choose better without a pin; CPUs copy nothing here.
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
    """Returns whether the blocks of a stack read their own rows: unrolled, and all `full`."""
    if unroll == 1 or isinstance(remat, Schedule):
        return False
    return all(stage.schedule == "full" for stage in plan_and_policy(remat)[0].stages)


def read_inside(apply: Callable, items, whole, start: int):
    """Returns an `apply` that reads its own row, and its items: pairs of a row and its index.

    Args:
      apply: `(carry, params_i) -> carry`.
      items: The parameters of the blocks to run; gradients go to these.
      whole: The parameters of the stack that holds these blocks, which avoids a copy of a part.
      start: The row of the first of the blocks in `whole`.
    """
    # The values of `items` are never read, so they cost nothing; they only receive the gradients.
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
    """Returns `stacked[index]`, differentiated as if it were `row`."""
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
        # JAX would make the tangents of slots on the device, so forward mode is refused here.
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
    # JAX's batching rule makes a gather, which refuses an array on the host with an index on the
    # device.
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
    # Copies of the input rather than zeros: this works for keys and for any sharding.
    return lax.broadcast(x, (count,))


def _on_host(x, count: int):
    """Returns `count` rows like `x` on the host; rows of keys stay on the device."""
    if not x.size or _is_key(x):
        (rows,) = _moved([_on_device(x, count)], jax.memory.Space.Host)
        return rows
    return zeros(count, jax.typeof(x).update(memory_space=jax.memory.Space.Host))


def _moved(leaves, space) -> list:
    return [x if _is_key(x) else jax.device_put(x, space) for x in leaves]


def _is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.extended)


def row_major(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the same arrays; on a GPU their last axis is contiguous in memory."""
    pinned = lambda leaves: [_pin(leaf) for leaf in leaves]
    return lax.platform_dependent(list(leaves), cuda=pinned, rocm=pinned, default=lambda x: x)


def _pin(x: jax.Array) -> jax.Array:
    if x.ndim < 2 or _is_key(x):
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
