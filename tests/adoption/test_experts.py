"""Experts in every other layer, with an auxiliary loss: a list of dataclasses in plain JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from tests.adoption.cases import changed_lines, check, check_fit, product

L, TOKENS, WIDTH, EXPERTS = 12, 1024, 32, 4


def normal(key, *shape):
    return jax.random.normal(key, shape) / shape[-2] ** 0.5


def dropped(x, key):
    return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    up: jax.Array
    down: jax.Array

    @classmethod
    def make(cls, key, width):
        return cls(normal(key, width, 4 * width), 0.5 * normal(key, 4 * width, width))

    def __call__(self, x, key):
        return x + dropped(jax.nn.gelu(x @ self.up) @ self.down, key), jnp.zeros([])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Experts:
    router: jax.Array
    up: jax.Array
    down: jax.Array

    @classmethod
    def make(cls, key, width):
        up = normal(key, EXPERTS, width, 2 * width)
        return cls(normal(key, width, EXPERTS), up, 0.5 * normal(key, EXPERTS, 2 * width, width))

    def __call__(self, x, key):
        gates = jax.nn.softmax(x @ self.router)
        y = jnp.einsum(
            "nef,efd->ned", jax.nn.gelu(jnp.einsum("nd,edf->nef", x, self.up)), self.down
        )
        balance = EXPERTS * jnp.square(gates.mean(0)).sum()
        return x + dropped(jnp.einsum("ned,ne->nd", y, gates), key), balance


def model(layers, x, keys, remat):
    loss = 0.0
    for i, layer in enumerate(layers):
        x, balance = layer(x, keys[i])
        loss += balance
    return x, loss


def adopted(layers, x, keys, remat):
    call = lambda layer, x, key: layer(x, key)
    x, loss = jaxckpt.run(layers, call, x, each={"key": keys}, out=0, remat=remat)
    return x, loss.sum()


def loss_of(run, remat="full"):
    def loss(layers, x):
        keys = jax.random.split(jax.random.key(1), len(layers))
        x, balance = run(layers, x, keys, remat)
        return jnp.square(x).mean() + 0.01 * balance

    return loss


def arguments(depth=L, batch=TOKENS, width=WIDTH):
    """Returns the arguments of both losses."""
    kinds = [(Experts if i % 2 else Dense) for i in range(depth)]
    keys = jax.random.split(jax.random.key(2), depth)
    layers = [kind.make(key, width) for kind, key in zip(kinds, keys, strict=True)]
    return layers, jax.random.normal(jax.random.key(0), (batch, width))


def pair(**sizes):
    """Returns the losses of both models under `full`, and their arguments."""
    return loss_of(model), loss_of(adopted), *arguments(**sizes)


@pytest.mark.slow
def test_weights_and_masks_are_the_models():
    assert changed_lines(model, adopted) <= 4  # one of them is the function's name
    experts = product(TOKENS, EXPERTS, WIDTH, 2 * WIDTH)
    again = product(TOKENS, WIDTH, 4 * WIDTH) + product(TOKENS, WIDTH, EXPERTS) + 2 * experts
    check(*pair(), again=L // 2 * again)


@pytest.mark.heavy
def test_fit():
    check_fit(lambda plan: loss_of(adopted, plan), L, *arguments())
