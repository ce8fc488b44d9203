"""Data parallelism by `jax.shard_map`: weights on every device, rows of the batch, a mean loss."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxckpt
from tests.adoption.cases import changed_lines, check, check_fit

L, WIDTH = 8, 32
X = jax.random.normal(jax.random.key(0), (1024, WIDTH))
KEYS = jax.random.split(jax.random.key(1), L)
LAYERS = [
    {
        "up": jax.random.normal(key, (WIDTH, 4 * WIDTH)) / WIDTH**0.5,
        "down": 0.25 * jax.random.normal(key, (4 * WIDTH, WIDTH)) / WIDTH**0.5,
    }
    for key in jax.random.split(jax.random.key(2), L)
]


def layer(params, x, key):
    y = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    y = jax.nn.gelu(y @ params["up"]) @ params["down"]
    # Every device draws other masks.
    key = jax.random.fold_in(key, jax.lax.axis_index("batch"))
    return x + jnp.where(jax.random.bernoulli(key, 0.9, y.shape), y, 0)


def model(layers, x, remat):
    for i, params in enumerate(layers):
        x = layer(params, x, KEYS[i])
    return jax.lax.pmean(jnp.square(x).mean(), "batch")


def adopted(layers, x, remat):
    x = jaxckpt.run(layers, layer, x, each={"key": KEYS}, remat=remat)
    return jax.lax.pmean(jnp.square(x).mean(), "batch")


def loss_of(run, remat="full"):
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    step = lambda layers, x: run(layers, x, remat)
    return jax.shard_map(step, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())


@pytest.mark.slow
def test_weights_and_masks_are_the_models():
    assert changed_lines(model, adopted) <= 3
    check(loss_of(model), loss_of(adopted), LAYERS, X)


@pytest.mark.slow
def test_fit():
    check_fit(lambda plan: loss_of(adopted, plan), L, LAYERS, X)
