"""A Linen ResNet with BatchNorm: stages whose first block has another shape, and statistics."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import jaxckpt
from tests.adoption.cases import changed_lines, check, check_fit, product
from tests.transforms.cases import relative_error

L, BATCH, SIDE, WIDTH = 5, 16, 16, 8


class Block(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        norm = lambda: nn.BatchNorm(use_running_average=not train, momentum=0.9)
        y = nn.Conv(self.width, (3, 3), self.stride, use_bias=False)(x)
        y = nn.Conv(self.width, (3, 3), use_bias=False)(nn.relu(norm()(y)))
        if y.shape != x.shape:
            x = norm()(nn.Conv(self.width, (1, 1), self.stride, use_bias=False)(x))
        return nn.relu(x + norm()(y))


class Model(nn.Module):
    depth: int = L
    width: int = WIDTH
    remat: str = "full"

    def setup(self):
        make = lambda width: [Block(width, 1 + (i == 0)) for i in range(self.depth)]
        self.stages = [make(width) for width in (self.width, 2 * self.width)]

    def __call__(self, x, train):
        for blocks in self.stages:
            for block in blocks:
                x = block(x, train)
        return x.mean((1, 2))


class Adopted(Model):
    def __call__(self, x, train):
        for blocks in self.stages:
            x = blocks[0](x, train)
            x = jaxckpt.linen.run(blocks[1:], x, train, remat=self.remat)
        return x.mean((1, 2))


def loss_of(model, variables):
    def loss(params, x):
        state = {**variables, "params": params}
        return jnp.square(model.apply(state, x, True, mutable=["batch_stats"])[0]).mean()

    return loss


def arguments(depth=L, batch=BATCH, side=SIDE, width=WIDTH):
    """Returns the variables of both models, and their input."""
    x = jax.random.normal(jax.random.key(0), (batch, side, side, 3))
    return Model(depth, width).init(jax.random.key(1), x, False), x


def pair(depth=L, width=WIDTH, **sizes):
    """Returns the losses of both models under `full`, and their arguments."""
    variables, x = arguments(depth, width=width, **sizes)
    losses = [loss_of(kind(depth, width), variables) for kind in (Model, Adopted)]
    return *losses, variables["params"], x


@pytest.mark.slow
def test_weights_and_statistics_are_the_models():
    assert changed_lines(Model.__call__, Adopted.__call__) <= 3
    variables, x = arguments()
    # Two stages of two convolutions, equal in cost: a fourth of the points, twice the channels.
    again = 4 * product(BATCH, SIDE**2 // 4, 9, WIDTH, WIDTH)
    # Each stage's first block is not in its list, and keeps its residuals.
    check(*pair(), again=(L - 1) * again, well_below=0.6)
    new = [
        jax.jit(lambda v, m=m: m.apply(v, x, True, mutable=["batch_stats"])[1])(variables)
        for m in (Model(), Adopted())
    ]
    assert relative_error(*new) <= 1e-5
    assert relative_error(new[0], {"batch_stats": variables["batch_stats"]}) > 0.01


@pytest.mark.heavy
def test_fit():
    variables, x = arguments()
    check_fit(lambda plan: loss_of(Adopted(remat=plan), variables), L - 1, variables["params"], x)
