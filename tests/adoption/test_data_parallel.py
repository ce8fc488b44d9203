"""Data parallelism by `jax.shard_map`: weights on every device, rows of the batch, a mean loss."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxckpt
from tests.adoption.cases import changed_lines, check, check_fit, product

L, ROWS, WIDTH = 8, 1024, 32


def layer(params, x, key):
    y = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    y = jax.nn.gelu(y @ params["up"]) @ params["down"]
    # Every device draws other masks.
    key = jax.random.fold_in(key, jax.lax.axis_index("batch"))
    return x + jnp.where(jax.random.bernoulli(key, 0.9, y.shape), y, 0)


def model(layers, x, remat):
    keys = jax.random.split(jax.random.key(1), len(layers))
    for i, params in enumerate(layers):
        x = layer(params, x, keys[i])
    return jax.lax.pmean(jnp.square(x).mean(), "batch")


def adopted(layers, x, remat):
    keys = jax.random.split(jax.random.key(1), len(layers))
    x = jaxckpt.run(layers, layer, x, each={"key": keys}, remat=remat)
    return jax.lax.pmean(jnp.square(x).mean(), "batch")


def loss_of(run, remat="full"):
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    step = lambda layers, x: run(layers, x, remat)
    return jax.shard_map(step, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())


def arguments(depth=L, batch=ROWS, width=WIDTH):
    """Returns the arguments of both losses."""

    def layer_of(key):
        up, down = (jax.random.normal(one, (width, 4 * width)) for one in jax.random.split(key))
        return {"up": up / width**0.5, "down": 0.25 * down.T / width**0.5}

    layers = [layer_of(key) for key in jax.random.split(jax.random.key(2), depth)]
    return layers, jax.random.normal(jax.random.key(0), (batch, width))


def pair(**sizes):
    """Returns the losses of both models under `full`, and their arguments."""
    return loss_of(model), loss_of(adopted), *arguments(**sizes)


@pytest.mark.slow
def test_weights_and_masks_are_the_models():
    assert changed_lines(model, adopted) <= 3
    check(*pair(), again=L * product(ROWS, WIDTH, 4 * WIDTH))


@pytest.mark.slow
def test_fit():
    check_fit(lambda plan: loss_of(adopted, plan), L, *arguments())
