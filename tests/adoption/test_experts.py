"""Experts in every other layer, with an auxiliary loss: a list of dataclasses in plain JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from tests.adoption.cases import changed_lines, check, check_fit

L, WIDTH, EXPERTS = 12, 32, 4
X = jax.random.normal(jax.random.key(0), (1024, WIDTH))
KEYS = jax.random.split(jax.random.key(1), L)


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
    def make(cls, key):
        return cls(normal(key, WIDTH, 4 * WIDTH), 0.5 * normal(key, 4 * WIDTH, WIDTH))

    def __call__(self, x, key):
        return x + dropped(jax.nn.gelu(x @ self.up) @ self.down, key), jnp.zeros([])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Experts:
    router: jax.Array
    up: jax.Array
    down: jax.Array

    @classmethod
    def make(cls, key):
        up = normal(key, EXPERTS, WIDTH, 2 * WIDTH)
        return cls(normal(key, WIDTH, EXPERTS), up, 0.5 * normal(key, EXPERTS, 2 * WIDTH, WIDTH))

    def __call__(self, x, key):
        gates = jax.nn.softmax(x @ self.router)
        y = jnp.einsum(
            "nef,efd->ned", jax.nn.gelu(jnp.einsum("nd,edf->nef", x, self.up)), self.down
        )
        balance = EXPERTS * jnp.square(gates.mean(0)).sum()
        return x + dropped(jnp.einsum("ned,ne->nd", y, gates), key), balance


def model(layers, x, remat):
    loss = 0.0
    for i, layer in enumerate(layers):
        x, balance = layer(x, KEYS[i])
        loss += balance
    return x, loss


def adopted(layers, x, remat):
    call = lambda layer, x, key: layer(x, key)
    x, loss = jaxckpt.run(layers, call, x, each={"key": KEYS}, out=0, remat=remat)
    return x, loss.sum()


LAYERS = [(Experts if i % 2 else Dense).make(key) for i, key in enumerate(KEYS)]


def loss_of(run, remat="full"):
    def loss(layers, x):
        x, balance = run(layers, x, remat)
        return jnp.square(x).mean() + 0.01 * balance

    return loss


def pair():
    """Returns the losses of both models under `full`, and their arguments."""
    return loss_of(model), loss_of(adopted), LAYERS, X


@pytest.mark.slow
def test_weights_and_masks_are_the_models():
    assert changed_lines(model, adopted) <= 4  # one of them is the function's name
    check(*pair())


@pytest.mark.heavy
def test_fit():
    check_fit(lambda plan: loss_of(adopted, plan), L, LAYERS, X)
