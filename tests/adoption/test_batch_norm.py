"""A Linen ResNet with BatchNorm: stages whose first block has another shape, and statistics.

The block is the straightened bottleneck of Wide ResNets, B(1, 3, 1): three convolutions of one
width. Without remat a block keeps four arrays: what each convolution returns, and the sum.
"""

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
        y = nn.Conv(self.width, (1, 1), self.stride, use_bias=False)(x)
        y = nn.Conv(self.width, (3, 3), use_bias=False)(nn.relu(norm()(y)))
        y = nn.Conv(self.width, (1, 1), use_bias=False)(nn.relu(norm()(y)))
        if y.shape != x.shape:
            x = norm()(nn.Conv(self.width, (1, 1), self.stride, use_bias=False)(x))
        return nn.relu(x + norm()(y))


class Model(nn.Module):
    depth: int = L
    width: int = WIDTH
    remat: str = "full"

    def setup(self):
        self.stem = nn.Conv(self.width, (3, 3))
        make = lambda width, strides: [Block(width, stride) for stride in strides]
        same = (1,) * (self.depth - 1)
        self.stages = [make(self.width, (1, *same)), make(2 * self.width, (2, *same))]

    def __call__(self, x, train):
        x = self.stem(x)
        for blocks in self.stages:
            for block in blocks:
                x = block(x, train)
        return x.mean((1, 2))


class Adopted(Model):
    def __call__(self, x, train):
        x = self.stem(x)
        for blocks in self.stages:
            with jaxckpt.linen.remat_of(Block, "full"):
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
    # Two stages, equal in cost: the second has a fourth of the points and twice the channels. Each
    # block's convolutions are a 3x3 and two 1x1; the strided one and its shortcut are half each.
    again = 11 * product(BATCH, SIDE**2, WIDTH, WIDTH)
    check(*pair(), again=2 * L * again, well_below=0.5)
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
