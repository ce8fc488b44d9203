"""`scan_blocks` under other libraries: an Equinox module and a plain function, no adapter."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt import schedules
from jaxckpt.plans import Plan
from jaxckpt.schedules.of_stage import stack_schedule_of
from tests.transforms.cases import Counter, relative_error

NUM_BLOCKS, WIDTH = 6, 8
X = jnp.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)
PLANS = ("full", "dots", "names:hidden", "uniform:2", "sqrt", "log", "2xnone/2xbinomial:1/full")


class Block(eqx.Module):
    """A residual MLP: arrays, a nonlinearity that is a function, a float that is static."""

    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    activation: object
    scale: float = eqx.field(static=True)

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.up = eqx.nn.Linear(WIDTH, 16, key=up)
        self.down = eqx.nn.Linear(16, WIDTH, key=down)
        self.dropout = eqx.nn.Dropout(0.2)
        self.activation = jnp.tanh
        self.scale = 1.1

    def __call__(self, x, key):
        hidden = self.activation(jaxckpt.tag(self.up(self.norm(x)), "hidden"))
        return x + self.scale * self.down(self.dropout(hidden, key=key))


def run_equinox(blocks, x, key, plan, counter=None):
    """Returns the carry after stacked Equinox blocks: arrays are parameters, the rest is not."""
    arrays, static = eqx.partition(blocks, eqx.is_array)

    def apply(x, block_i):
        arrays, key = block_i
        if counter is not None:
            jax.debug.callback(lambda _: counter(0), x[0, 0])
        block = eqx.combine(arrays, static)
        return jax.vmap(block)(x, jax.random.split(key, len(x)))

    keys = jax.random.split(key, NUM_BLOCKS)
    return jaxckpt.scan_blocks(apply, (arrays, keys), x, remat=plan)


def run_function(blocks, x, key, plan, counter=None):
    """Returns the carry after a plain function that closes over an array and takes a const."""
    shift = blocks["shift"]

    def apply(x, block_i, scale):
        if counter is not None:
            jax.debug.callback(lambda _: counter(0), x[0, 0])
        hidden = jnp.tanh(jaxckpt.tag(x @ block_i["w"] + shift, "hidden"))
        keep = jax.random.bernoulli(block_i["key"], 0.8, hidden.shape)
        return x + scale * jnp.where(keep, hidden, 0.0) @ block_i["w"].T

    stacked = {"w": blocks["w"], "key": jax.random.split(key, NUM_BLOCKS)}
    return jaxckpt.scan_blocks(apply, stacked, x, blocks["scale"], remat=plan)


def equinox_blocks():
    return eqx.filter_vmap(Block)(jax.random.split(jax.random.key(0), NUM_BLOCKS))


def function_blocks():
    w = 0.3 * jax.random.normal(jax.random.key(0), (NUM_BLOCKS, WIDTH, 2 * WIDTH))
    return {"w": w, "shift": jnp.full(2 * WIDTH, 0.1), "scale": jnp.float32(1.1)}


FRAMEWORKS = {
    "equinox": (run_equinox, equinox_blocks),
    "function": (run_function, function_blocks),
}


def value_and_grads(framework, plan, counter=None):
    """Returns the loss and the gradients of blocks and input, dropout on."""
    run, make = FRAMEWORKS[framework]

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def fn(blocks_and_x):
        blocks, x = blocks_and_x
        return jnp.sin(run(blocks, x, jax.random.key(3), plan, counter)).sum()

    return fn((make(), X))


@functools.cache
def without_remat(framework):
    return value_and_grads(framework, "none")


@pytest.mark.heavy
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_gradients_equal_none(framework, plan):
    got, want = value_and_grads(framework, plan), without_remat(framework)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert relative_error(got, want) <= 1e-6


@pytest.mark.slow
def test_an_equinox_stack_equals_the_loop_of_its_modules():
    blocks = equinox_blocks()
    arrays, static = eqx.partition(blocks, eqx.is_array)
    x, keys = X, jax.random.split(jax.random.key(3), NUM_BLOCKS)
    for i in range(NUM_BLOCKS):
        block = eqx.combine(jax.tree.map(lambda leaf, i=i: leaf[i], arrays), static)
        x = jax.vmap(block)(x, jax.random.split(keys[i], len(x)))
    assert relative_error(run_equinox(blocks, X, jax.random.key(3), "log"), x) <= 1e-6


def promised(plan: str) -> int:
    """Returns how many blocks one evaluation of loss and gradients runs."""
    stage = Plan.parse(plan).bind(NUM_BLOCKS).stages[0]
    if stage.schedule == "none":
        return NUM_BLOCKS
    if stage.schedule == "full":
        return 2 * NUM_BLOCKS
    if stage.schedule == "uniform":
        return 2 * NUM_BLOCKS - schedules.segment_sizes(NUM_BLOCKS, stage.argument)[-1]
    return NUM_BLOCKS + stack_schedule_of(stage).extra_forwards


@pytest.mark.slow
@pytest.mark.parametrize("plan", ("none", "full", "uniform:2", "sqrt", "log", "binomial:1"))
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_blocks_are_evaluated_as_often_as_the_plan_says(framework, plan):
    """The twin: it fails if remat did nothing."""
    counter = Counter()
    jax.block_until_ready(jax.tree.leaves(value_and_grads(framework, plan, counter)))
    jax.effects_barrier()
    assert counter.total == promised(plan)
