"""An NNX decoder of two kinds of layers: five with a sliding window, one without, two left over."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxckpt
from tests.adoption.cases import changed_lines, check, check_fit

L, WIDTH, HEADS = 14, 32, 4
X = jax.random.normal(jax.random.key(0), (16, 32, WIDTH))


class Layer(nnx.Module):
    def __init__(self, window, *, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
        self.output = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.gate = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)
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
    def __init__(self, rngs):
        windows = [None if i % 6 == 5 else 4 for i in range(L)]
        self.layers = getattr(nnx, "List", list)([Layer(one, rngs=rngs) for one in windows])

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


@pytest.mark.slow
def test_weights_and_masks_are_the_models():
    assert changed_lines(Model.__call__, Adopted.__call__) <= 3
    models = [kind(nnx.Rngs(0)) for kind in (Model, Adopted)]
    check(*map(loss_of, models), nnx.state(models[0], nnx.Param), X)
    counts = [[int(x) for x in jax.tree.leaves(nnx.state(m, nnx.RngCount))] for m in models]
    assert counts[0] == counts[1]


@pytest.mark.heavy
def test_fit():
    def loss_under(plan):
        model = Adopted(nnx.Rngs(0))
        model.remat = plan
        return loss_of(model)

    check_fit(loss_under, L, nnx.state(Model(nnx.Rngs(0)), nnx.Param), X)
