"""Parameters in bfloat16 that an optimizer updates in float32, rounded stochastically.

A bfloat16 has eight significant bits. Rounding to the nearest number would lose every update below
a 512th of a weight. Stochastic rounding goes up or down with probabilities in proportion to the
distances, so the mean of the rounded weights is right (Gupta et al. 2015, Deep learning with
limited numerical precision).
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class RoundedState(NamedTuple):
    """The state of `stochastically_rounded`.

    Attributes:
      inner: The state of the optimizer.
      count: The number of updates.
      rows: For each rounded parameter, the indices of its rows, float32 because all state of a
        block is floating. Each row draws its own random bits, so that a block is rounded alike
        alone and in its stack.
    """

    inner: Any
    count: jax.Array
    rows: Any


def stochastically_rounded(
    optimizer: optax.GradientTransformation, seed: int
) -> optax.GradientTransformation:
    """Returns an optimizer that computes in float32; parameters in bfloat16 are rounded by chance.

    Args:
      optimizer: The optimizer; its state is made for float32 parameters.
      seed: The seed of the random bits, together with the update, the parameter and the row.
    """

    def init(params):
        rows = lambda x: jnp.arange(x.shape[0], dtype=jnp.float32) if _is_narrow(x) else None
        count = jnp.zeros([], jnp.int32)
        return RoundedState(optimizer.init(_wide(params)), count, jax.tree.map(rows, params))

    def update(updates: Any, state: Any, params: Any = None, **_: Any):
        wide = _wide(params)
        updates, inner = optimizer.update(_wide(updates), state.inner, wide)

        def one(path, update, old, narrow):
            if not _is_narrow(narrow):
                return update
            rows = state.rows
            for part in path:
                rows = rows[part.key]
            key = jax.random.fold_in(jax.random.key(seed), state.count)
            key = jax.random.fold_in(key, _number(path))
            # The old and the new parameter are bfloat16 numbers, so their difference is exact.
            return _rounded(old + update, rows.astype(jnp.int32), key) - old

        updates = jax.tree_util.tree_map_with_path(one, updates, wide, params)
        return updates, RoundedState(inner, state.count + 1, state.rows)

    return optax.GradientTransformation(init, update)


def _wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _is_narrow(x) else x, tree)


def _is_narrow(x) -> bool:
    return x.dtype == jnp.bfloat16


def _number(path) -> int:
    """Returns a number for a parameter's path, the same in every process."""
    return zlib.crc32(jax.tree_util.keystr(path).encode())


def _rounded(x, rows, key):
    """Returns float32 numbers that are bfloat16 numbers, rounded up or down by chance."""
    bits = jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row), x.shape[1:]))(rows)
    # A bfloat16 is the upper half of a float32. A random lower half carries into it as often as
    # the number is near to the next one.
    carried = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits & 0xFFFF)
    rounded = jax.lax.bitcast_convert_type(carried & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x)
