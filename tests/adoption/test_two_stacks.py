"""A Linen encoder-decoder: the first block of each makes the position bias of all its blocks."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import jaxckpt
from tests.adoption.cases import attention, changed_lines, check, check_fit, product

L, BATCH, LENGTH, WIDTH, HEADS = 7, 16, 32, 32, 4
DROPOUT = {"dropout": jax.random.key(2)}


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, memory, bias):
        width = x.shape[-1]
        project = lambda: nn.DenseGeneral((HEADS, width // HEADS), use_bias=False)
        query, key, value = (project()(y) for y in (x, memory, memory))
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) + bias)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return nn.DenseGeneral(width, axis=(-2, -1), use_bias=False)(y)


class Block(nn.Module):
    makes_bias: bool
    causal: bool

    @nn.compact
    def __call__(self, x, bias=None, memory=None, deterministic=True):
        drop = nn.Dropout(0.1, deterministic=deterministic)
        if self.makes_bias:
            length = x.shape[1]
            distance = jnp.arange(length)[:, None] - jnp.arange(length)
            table = self.param("relative", nn.initializers.normal(1.0), (2 * length - 1, HEADS))
            bias = jnp.moveaxis(table[distance + length - 1], -1, 0)
            bias = jnp.where(self.causal & (distance < 0), -1e9, bias)
        y = nn.RMSNorm()(x)
        x = x + drop(Attention()(y, y, bias))
        if memory is not None:
            x = x + drop(Attention()(nn.RMSNorm()(x), memory, 0.0))
        width = x.shape[-1]
        return x + drop(nn.Dense(width)(nn.relu(nn.Dense(4 * width)(nn.RMSNorm()(x))))), bias


class Blocks(nn.Module):
    depth: int
    causal: bool

    def setup(self):
        self.block = [Block(i == 0, self.causal) for i in range(self.depth)]

    def __call__(self, x, memory=None, deterministic=True):
        bias = None
        for block in self.block:
            x, bias = block(x, bias, memory, deterministic=deterministic)
        return x


class Adopted(Blocks):
    remat: str = "full"

    def __call__(self, x, memory=None, deterministic=True):
        x, bias = self.block[0](x, None, memory, deterministic=deterministic)
        options = {"deterministic": deterministic, "out": lambda made: made[0]}
        x = jaxckpt.linen.run(self.block[1:], x, bias, memory, remat=self.remat, **options)
        return x


class Model(nn.Module):
    depth: int = L
    kind: type = Blocks
    options: tuple = ()

    def setup(self):
        self.encoder = self.kind(self.depth, False, *self.options)
        self.decoder = self.kind(self.depth, True, *self.options)

    def __call__(self, x, y):
        memory = self.encoder(x, deterministic=False)
        return self.decoder(y, memory, deterministic=False)


def loss_of(model):
    return lambda variables, x, y: jnp.square(model.apply(variables, x, y, rngs=DROPOUT)).mean()


def arguments(depth=L, batch=BATCH, length=LENGTH, width=WIDTH):
    """Returns the arguments of both losses."""
    x, y = (jax.random.normal(jax.random.key(i), (batch, length, width)) for i in range(2))
    return Model(depth).init(DROPOUT | {"params": jax.random.key(3)}, x, y), x, y


def pair(depth=L, **sizes):
    """Returns the losses of both models under `full`, and their arguments."""
    models = Model(depth), Model(depth, Adopted)
    return *map(loss_of, models), *arguments(depth, **sizes)


@pytest.mark.slow
def test_weights_and_masks_are_the_models():
    assert changed_lines(Blocks.__call__, Adopted.__call__) <= 3
    tokens = BATCH * LENGTH
    again = 3 * attention(tokens, WIDTH, LENGTH) + 2 * product(tokens, WIDTH, 4 * WIDTH)
    # The first block of each stack is not in its list, and keeps its residuals.
    check(*pair(), again=(L - 1) * again, well_below=0.45)


@pytest.mark.heavy
def test_fit():
    """Both stacks follow one plan."""
    check_fit(lambda plan: loss_of(Model(L, Adopted, (plan,))), L - 1, *arguments())
