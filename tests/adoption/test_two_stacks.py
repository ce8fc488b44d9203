"""A Linen encoder-decoder: the first block of each makes the position bias of all its blocks."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import jaxckpt
from tests.adoption.cases import changed_lines, check, check_fit

L, WIDTH, HEADS = 7, 32, 4
X, Y = (jax.random.normal(jax.random.key(i), (16, 32, WIDTH)) for i in range(2))
DROPOUT = {"dropout": jax.random.key(2)}


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, memory, bias):
        project = lambda: nn.DenseGeneral((HEADS, WIDTH // HEADS), use_bias=False)
        query, key, value = (project()(y) for y in (x, memory, memory))
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) + bias)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False)(y)


class Block(nn.Module):
    makes_bias: bool
    causal: bool

    @nn.compact
    def __call__(self, x, bias=None, memory=None, deterministic=True):
        drop = nn.Dropout(0.1, deterministic=deterministic)
        if self.makes_bias:
            distance = jnp.arange(32)[:, None] - jnp.arange(32)
            table = self.param("relative", nn.initializers.normal(1.0), (63, HEADS))
            bias = jnp.moveaxis(table[distance + 31], -1, 0)
            bias = jnp.where(self.causal & (distance < 0), -1e9, bias)
        y = nn.RMSNorm()(x)
        x = x + drop(Attention()(y, y, bias))
        if memory is not None:
            x = x + drop(Attention()(nn.RMSNorm()(x), memory, 0.0))
        return x + drop(nn.Dense(WIDTH)(nn.relu(nn.Dense(4 * WIDTH)(nn.RMSNorm()(x))))), bias


class Blocks(nn.Module):
    causal: bool

    def setup(self):
        self.block = [Block(i == 0, self.causal) for i in range(L)]

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
    kind: type = Blocks
    options: tuple = ()

    @nn.compact
    def __call__(self, x, y):
        memory = self.kind(False, *self.options, name="encoder")(x, deterministic=False)
        return self.kind(True, *self.options, name="decoder")(y, memory, deterministic=False)


def loss_of(model):
    return lambda variables, x, y: jnp.square(model.apply(variables, x, y, rngs=DROPOUT)).mean()


@pytest.mark.slow
def test_weights_and_masks_are_the_models():
    assert changed_lines(Blocks.__call__, Adopted.__call__) <= 3
    variables = Model().init(DROPOUT | {"params": jax.random.key(3)}, X, Y)
    check(loss_of(Model()), loss_of(Model(Adopted)), variables, X, Y, well_below=0.45)


@pytest.mark.heavy
def test_fit():
    """Both stacks follow one plan."""
    variables = Model().init(DROPOUT | {"params": jax.random.key(3)}, X, Y)
    check_fit(lambda plan: loss_of(Model(Adopted, (plan,))), L - 1, variables, X, Y)
