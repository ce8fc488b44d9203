"""An Equinox encoder: a list of modules, one example under `jax.vmap`, a key for every layer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from tests.adoption.cases import attention, changed_lines, check, check_fit, product

L, BATCH, LENGTH, WIDTH, HEADS = 6, 32, 32, 32, 4


class Layer(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, width, key):
        keys = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(HEADS, width, dropout_p=0.1, key=keys[0])
        self.norm = eqx.nn.LayerNorm(width)
        self.mlp = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=keys[1])
        self.dropout = eqx.nn.Dropout(0.1)

    def __call__(self, x, mask, *, key, inference=False):
        keys = jax.random.split(key)
        y = jax.vmap(self.norm)(x)
        x = x + self.attention(y, y, y, mask=mask, key=keys[0], inference=inference)
        return x + self.dropout(jax.vmap(self.mlp)(x), key=keys[1], inference=inference)


class Encoder(eqx.Module):
    layers: list[Layer]

    def __call__(self, x, mask, key):
        keys = jax.random.split(key, len(self.layers))
        for layer, layer_key in zip(self.layers, keys, strict=True):
            x = layer(x, mask, key=layer_key)
        return x


class Adopted(Encoder):
    remat: str = eqx.field(static=True, default="full")

    def __call__(self, x, mask, key):
        keys = jax.random.split(key, len(self.layers))
        apply = lambda layer, x, mask, key: layer(x, mask, key=key)
        x = jaxckpt.run(self.layers, apply, x, mask, each={"key": keys}, remat=self.remat)
        return x


def layers_of(depth=L, width=WIDTH):
    """Returns the arrays of a list of layers, and the rest."""
    layers = [Layer(width, key) for key in jax.random.split(jax.random.key(2), depth)]
    return eqx.partition(layers, eqx.is_array)


def loss_of(static, kind, *options):
    def loss(arrays, x):
        keys = jax.random.split(jax.random.key(1), len(x))
        encoder = kind(eqx.combine(arrays, static), *options)
        mask = jnp.tril(jnp.ones(x.shape[1:2] * 2, bool))
        return jnp.square(jax.vmap(lambda x, key: encoder(x, mask, key))(x, keys)).mean()

    return loss


def pair(depth=L, batch=BATCH, length=LENGTH, width=WIDTH):
    """Returns the losses of both models under `full`, and their arguments."""
    arrays, static = layers_of(depth, width)
    x = jax.random.normal(jax.random.key(0), (batch, length, width))
    return loss_of(static, Encoder), loss_of(static, Adopted), arrays, x


@pytest.mark.slow
def test_weights_and_masks_are_the_models():
    assert changed_lines(Encoder.__call__, Adopted.__call__) <= 3
    tokens = BATCH * LENGTH
    again = attention(tokens, WIDTH, LENGTH) + product(tokens, WIDTH, 4 * WIDTH)
    check(*pair(), again=L * again)


@pytest.mark.heavy
def test_fit():
    *_, arrays, x = pair()
    _, static = layers_of()
    check_fit(lambda plan: loss_of(static, Adopted, plan), L, arrays, x)
