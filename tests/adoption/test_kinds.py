"""An NNX decoder of two kinds of layers: five with a sliding window, one without, two left over."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxckpt
from tests.adoption.cases import attention, changed_lines, check, check_fit, product

L, BATCH, LENGTH, WIDTH, HEADS = 14, 16, 32, 32, 4


class Layer(nnx.Module):
    def __init__(self, width, window, *, rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.output = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.gate = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.window = window

    def __call__(self, x, cache):
        query, key, value = jnp.split(
            self.qkv(self.norm(x)).reshape(*x.shape[:2], HEADS, -1), 3, -1
        )
        distance = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])
        mask = (distance >= 0) & (distance < (self.window or x.shape[1]))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        weights = nnx.softmax(jnp.where(mask, scores, -1e9))
        x = x + self.dropout(
            self.output(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape))
        )
        return cache, x + self.dropout(self.down(nnx.silu(self.gate(x))))


class Model(nnx.Module):
    def __init__(self, depth=L, width=WIDTH):
        windows, rngs = [None if i % 6 == 5 else 4 for i in range(depth)], nnx.Rngs(0)
        self.layers = getattr(nnx, "List", list)([Layer(width, one, rngs=rngs) for one in windows])

    def __call__(self, x):
        for layer in self.layers:
            _, x = layer(x, None)
        return x


class Adopted(Model):
    remat = "full"

    def __call__(self, x):
        _, x = jaxckpt.nnx.run(self.layers, x, None, out=1, remat=self.remat)
        return x


def loss_of(model):
    graph, _, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        return jnp.square(nnx.merge(graph, params, jax.tree.map(jnp.array, rest))(x)).mean()

    return loss


def arguments(depth=L, batch=BATCH, length=LENGTH, width=WIDTH):
    """Returns the arguments of both losses."""
    x = jax.random.normal(jax.random.key(0), (batch, length, width))
    return nnx.state(Model(depth, width), nnx.Param), x


def pair(depth=L, width=WIDTH, **sizes):
    """Returns the losses of both models under `full`, and their arguments."""
    losses = [loss_of(kind(depth, width)) for kind in (Model, Adopted)]
    return *losses, *arguments(depth, width=width, **sizes)


@pytest.mark.slow
def test_weights_and_masks_are_the_models():
    assert changed_lines(Model.__call__, Adopted.__call__) <= 3
    tokens = BATCH * LENGTH
    again = attention(tokens, WIDTH, LENGTH) + product(tokens, WIDTH, 4 * WIDTH)
    check(*pair(), again=L * again)
    models = [kind() for kind in (Model, Adopted)]
    for model in models:
        model(arguments()[1])
    counts = [[int(x) for x in jax.tree.leaves(nnx.state(m, nnx.RngCount))] for m in models]
    assert counts[0] == counts[1] and set(counts[0]) == {2}


@pytest.mark.heavy
def test_fit():
    def loss_under(plan):
        model = Adopted()
        model.remat = plan
        return loss_of(model)

    check_fit(loss_under, L, *arguments())
