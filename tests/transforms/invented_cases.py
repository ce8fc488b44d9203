"""A block with products in every kind of call, a step of a stack of it, and how results compare."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxckpt
from jaxckpt.costs.flops import count_flops

WIDTH, ROWS, NUM_BLOCKS = 8, 16, 4
DOT = 2 * ROWS * WIDTH * WIDTH  # FLOPs of one product
ARRAY = 4 * ROWS * WIDTH  # bytes of one array


@jax.custom_vjp
def product(x, w):
    """A function whose derivative rule runs a step that the function alone does not."""
    return jnp.sin(x @ w)


def _product_rule(x, w):
    y = x @ w
    return jnp.sin(y), (jnp.cos(y), x, w)


def _product_reversed(kept, grad):
    cos, x, w = kept
    return (grad * cos) @ w.T, x.T @ (grad * cos)


product.defvjp(_product_rule, _product_reversed)


def block(x, row):
    """Dropout, and a product under each of custom_vjp, jit, scan, jax.checkpoint and cond."""
    w = row["w"]
    y = product(x, w)
    keep = jax.random.bernoulli(row["key"], 0.8, y.shape)
    y = jnp.where(keep, jax.nn.silu(jaxckpt.tag(y, "mine") @ w), 0.0)
    y, _ = jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), y, None, length=3)
    y = jax.checkpoint(lambda y: jnp.exp(-jnp.square(y @ w)))(y)
    y = jax.lax.cond(y[0, 0] > 2, lambda y: jnp.sin(y @ w), lambda y: jnp.cos(y @ w), y)
    return x + y


def arguments():
    keys = jax.random.split(jax.random.key(0), NUM_BLOCKS)
    w = 0.3 * jax.random.normal(keys[0], (NUM_BLOCKS, WIDTH, WIDTH))
    return {"w": w, "key": keys}, jax.random.normal(keys[1], (ROWS, WIDTH))


def step(plan, run=block):
    loss = lambda w, x, keys: jnp.sin(
        jaxckpt.scan_blocks(run, {"w": w, "key": keys}, x, remat=plan)
    ).sum()
    rows, x = arguments()
    return jax.value_and_grad(loss, argnums=(0, 1)), (rows["w"], x, rows["key"])


def flops(plan, run=block) -> int:
    fn, args = step(plan, run)
    return count_flops(jax.make_jaxpr(fn)(*args))


def close(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max(), rtol=0)
