"""A Linen ResNet with BatchNorm: stages whose first block has another shape, and statistics."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import jaxckpt
from tests.adoption.cases import changed_lines, check, check_fit
from tests.transforms.cases import relative_error

L, WIDTHS = 5, (8, 16)
X = jax.random.normal(jax.random.key(0), (16, 16, 16, 3))


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
    remat: str = "full"

    def setup(self):
        make = lambda width: [Block(width, 1 + (i == 0)) for i in range(L)]
        self.stages = [make(width) for width in WIDTHS]

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


def pair():
    """Returns the losses of both models under `full`, and their arguments."""
    variables = Model().init(jax.random.key(1), X, False)
    losses = [loss_of(model, variables) for model in (Model(), Adopted())]
    return *losses, variables["params"], X


@pytest.mark.slow
def test_weights_and_statistics_are_the_models():
    assert changed_lines(Model.__call__, Adopted.__call__) <= 3
    variables = Model().init(jax.random.key(1), X, False)
    # Each stage's first block is not in its list, and keeps its residuals.
    check(*pair(), well_below=0.6)
    new = [
        jax.jit(lambda v, m=m: m.apply(v, X, True, mutable=["batch_stats"])[1])(variables)
        for m in (Model(), Adopted())
    ]
    assert relative_error(*new) <= 1e-5
    assert relative_error(new[0], {"batch_stats": variables["batch_stats"]}) > 0.01


@pytest.mark.heavy
def test_fit():
    variables = Model().init(jax.random.key(1), X, False)
    check_fit(lambda plan: loss_of(Adopted(remat=plan), variables), L - 1, variables["params"], X)
