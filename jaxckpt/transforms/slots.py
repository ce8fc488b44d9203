"""Slots for carries that a schedule keeps: arrays with a row a slot, on the device or on the host.

A carry is a list of leaves, and so are its slots. What is in a slot before it is written is never
read. On the host they are in pinned memory; a carry crosses the link when it is stored or loaded.
Random keys stay on the device: JAX forgets where an array of them is.
"""

import jax
import jax.numpy as jnp
from jax import lax


def empty(carry, count: int, *, on_host: bool) -> list:
    """Returns `count` slots for carries like `carry`."""
    return [_on_host(x, count) if on_host else _on_device(x, count) for x in carry]


def store(slots, slot, carry, *, on_host: bool) -> list:
    """Returns the slots with a carry in one of them."""
    return write(slots, slot, _moved(carry, jax.memory.Space.Host) if on_host else carry)


def load(slots, slot, *, on_host: bool) -> list:
    """Returns the carry in a slot, on the device."""
    carry = row(slots, slot)
    return _moved(carry, jax.memory.Space.Device) if on_host else carry


def row(leaves, index) -> list:
    """Returns one row of every leaf."""
    return [lax.dynamic_index_in_dim(x, index, keepdims=False) for x in leaves]


def write(leaves, index, rows) -> list:
    """Returns the leaves with one row of each replaced."""
    return [
        lax.dynamic_update_index_in_dim(x, row, index, 0)
        for x, row in zip(leaves, rows, strict=True)
    ]


def _on_device(x, count: int):
    # Copies of the input rather than zeros: right for key dtypes and for any sharding.
    return lax.broadcast(x, (count,))


def _on_host(x, count: int):
    """Returns rows like `x` on the host.

    Rows that are made on the device and then moved would be on the device as well, all at once.
    From a single number that was moved they are made where they are.
    """
    if not x.size or _is_key(x):
        (rows,) = _moved([_on_device(x, count)], jax.memory.Space.Host)
        return rows
    (one,) = _moved([x[(0,) * x.ndim]], jax.memory.Space.Host)
    return lax.broadcast(one, (count, *x.shape))


def _moved(leaves, space) -> list:
    return [x if _is_key(x) else jax.device_put(x, space) for x in leaves]


def _is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.extended)
