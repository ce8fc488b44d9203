"""A Linen decoder as of a model hub: a list that `setup()` makes, tuples, flags by keyword."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import jaxckpt
from tests.adoption.cases import attention, changed_lines, check, check_fit, product

L, BATCH, LENGTH, WIDTH, HEADS = 6, 32, 32, 32, 4
DROPOUT = {"dropout": jax.random.key(1)}


class Block(nn.Module):
    """Attention and an MLP; flags decide what is computed and what is returned."""

    width: int
    rate: float = 0.1

    @nn.compact
    def __call__(self, x, mask=None, deterministic=True, output_attentions=False):
        y = nn.LayerNorm()(x)
        # A key's bias has no gradient but rounding errors.
        project = lambda: nn.DenseGeneral((HEADS, self.width // HEADS), use_bias=False)
        query, key, value = (project()(y) for _ in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        scores = scores if mask is None else jnp.where(mask, scores, -1e9)
        weights = nn.softmax(scores)
        weights = nn.Dropout(self.rate, deterministic=deterministic)(weights)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        y = nn.DenseGeneral(self.width, axis=(-2, -1))(y)
        x = x + nn.Dropout(self.rate, deterministic=deterministic)(y)
        y = nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        x = x + nn.Dropout(self.rate, deterministic=deterministic)(y)
        return (x, weights) if output_attentions else (x,)


class Model(nn.Module):
    depth: int
    width: int

    def setup(self):
        self.h = [Block(self.width, name=str(i)) for i in range(self.depth)]
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


def loss_of(model, deterministic=False):
    def loss(variables, x):
        mask = jnp.tril(jnp.ones([1, 1, *x.shape[1:2] * 2], bool))
        return jnp.square(model.apply(variables, x, mask, deterministic, rngs=DROPOUT)).mean()

    return loss


def arguments(depth=L, batch=BATCH, length=LENGTH, width=WIDTH):
    """Returns the arguments of both losses."""
    x = jax.random.normal(jax.random.key(0), (batch, length, width))
    return Model(depth, width).init(jax.random.key(2), x, None), x


def pair(depth=L, width=WIDTH, **sizes):
    """Returns the losses of both models under `full`, and their arguments."""
    losses = [loss_of(kind(depth, width)) for kind in (Model, Adopted)]
    return *losses, *arguments(depth, width=width, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", (True, False))
def test_weights_and_masks_are_the_models(deterministic):
    assert changed_lines(Model.__call__, Adopted.__call__) <= 3
    losses = [loss_of(kind(L, WIDTH), deterministic) for kind in (Model, Adopted)]
    tokens = BATCH * LENGTH
    again = L * (attention(tokens, WIDTH, LENGTH) + product(tokens, WIDTH, 4 * WIDTH))
    check(*losses, *arguments(), again=again)


@pytest.mark.heavy
def test_fit():
    check_fit(lambda plan: loss_of(Adopted(L, WIDTH, plan)), L, *arguments())
