"""A Linen decoder as of a model hub: a list that `setup()` makes, tuples, flags by keyword."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import jaxckpt
from tests.adoption.cases import changed_lines, check, check_fit

L, WIDTH, HEADS = 6, 32, 4
X = jax.random.normal(jax.random.key(0), (32, 32, WIDTH))
MASK = jnp.tril(jnp.ones([1, 1, 32, 32], bool))
DROPOUT = {"dropout": jax.random.key(1)}


class Block(nn.Module):
    """Attention and an MLP; flags decide what is computed and what is returned."""

    rate: float = 0.1

    @nn.compact
    def __call__(self, x, mask=None, deterministic=True, output_attentions=False):
        y = nn.LayerNorm()(x)
        # A key's bias has no gradient but rounding errors.
        project = lambda: nn.DenseGeneral((HEADS, WIDTH // HEADS), use_bias=False)
        query, key, value = (project()(y) for _ in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        weights = nn.softmax(jnp.where(mask, scores, -1e9))
        weights = nn.Dropout(self.rate, deterministic=deterministic)(weights)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        y = nn.DenseGeneral(WIDTH, axis=(-2, -1))(y)
        x = x + nn.Dropout(self.rate, deterministic=deterministic)(y)
        y = nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        x = x + nn.Dropout(self.rate, deterministic=deterministic)(y)
        return (x, weights) if output_attentions else (x,)


class Model(nn.Module):
    def setup(self):
        self.h = [Block(name=str(i)) for i in range(L)]
        self.head = nn.Dense(1)

    def __call__(self, x, mask, deterministic=True):
        for block in self.h:
            outputs = block(x, mask, deterministic=deterministic, output_attentions=False)
            x = outputs[0]
        return self.head(x)


class Adopted(Model):
    remat: str = "full"

    def __call__(self, x, mask, deterministic=True):
        flags = {"deterministic": deterministic, "output_attentions": False}
        outputs = jaxckpt.linen.run(self.h, x, mask, out=0, remat=self.remat, **flags)
        x = outputs[0]
        return self.head(x)


def loss_of(model, deterministic):
    def loss(variables, x):
        return jnp.square(model.apply(variables, x, MASK, deterministic, rngs=DROPOUT)).mean()

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", (True, False))
def test_weights_and_masks_are_the_models(deterministic):
    assert changed_lines(Model.__call__, Adopted.__call__) <= 3
    losses = [loss_of(model, deterministic) for model in (Model(), Adopted())]
    check(*losses, Model().init(jax.random.key(2), X, MASK), X)


@pytest.mark.slow
def test_fit():
    variables = Model().init(jax.random.key(2), X, MASK)
    check_fit(lambda plan: loss_of(Adopted(remat=plan), False), L, variables, X)
