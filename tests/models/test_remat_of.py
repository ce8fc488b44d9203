"""`remat_of` and `nnx.remat_of`: Equinox and NNX classes, checkpointed wherever they are called."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxckpt
from tests.transforms.cases import Counter, relative_error

L, WIDTH = 4, 8
X = jnp.linspace(-1, 1, 64 * WIDTH).reshape(64, WIDTH)


class Block(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    counter: Counter | None = eqx.field(static=True)

    def __init__(self, key, counter=None):
        keys = jax.random.split(key)
        self.up = eqx.nn.Linear(WIDTH, 4 * WIDTH, key=keys[0])
        self.down = eqx.nn.Linear(4 * WIDTH, WIDTH, key=keys[1])
        self.counter = counter

    def __call__(self, x, *, act="tanh"):
        if self.counter is not None:
            jax.debug.callback(lambda _: self.counter(0), x[0, 0])
        hidden = {"tanh": jnp.tanh, "sin": jnp.sin}[act](jax.vmap(self.up)(x))
        return x + jax.vmap(self.down)(hidden), None


class NnxBlock(nnx.Module):
    def __init__(self, rngs, counter=None):
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.counter = counter

    def __call__(self, x, *, act="tanh", rngs=None):
        if self.counter is not None:
            jax.debug.callback(lambda _: self.counter(0), x[0, 0])
        hidden = {"tanh": jnp.tanh, "sin": jnp.sin}[act](self.norm(self.up(x)))
        return x + self.dropout(self.down(hidden), rngs=rngs), None


def run(layers, **named):
    x = X
    for layer in layers:
        x, _ = layer(x, act="sin", **named)
    return jnp.sin(x).sum()


def of_equinox(plan, counter=None):
    layers = [Block(key, counter) for key in jax.random.split(jax.random.key(0), L)]
    arrays, static = eqx.partition(layers, eqx.is_array)

    def loss(arrays):
        layers = eqx.combine(arrays, static)
        if plan is None:
            return run(layers)
        with jaxckpt.remat_of(Block, plan):
            return run(layers)

    return jax.jit(jax.value_and_grad(loss))(arrays)


def of_nnx(plan, counter=None):
    rngs = nnx.Rngs(0)
    layers = nnx.List([NnxBlock(rngs, counter) for _ in range(L)])
    stream = nnx.Rngs(dropout=3)

    @nnx.jit
    def step(layers, stream):
        def loss(layers, stream):
            if plan is None:
                return run(layers, rngs=stream)
            with jaxckpt.nnx.remat_of(NnxBlock, plan):
                return run(layers, rngs=stream)

        return nnx.value_and_grad(loss)(layers, stream)

    value, grads = step(layers, stream)
    assert stream.dropout.count[...] == L
    return value, nnx.to_pure_dict(grads), nnx.to_pure_dict(nnx.state(layers, nnx.BatchStat))


@pytest.mark.slow
@pytest.mark.parametrize("plan", ("none", "full", "dots"))
@pytest.mark.parametrize("of", (of_equinox, of_nnx))
def test_values_gradients_and_state_stay(of, plan):
    if not hasattr(nnx, "List"):
        pytest.skip("this Flax has no nnx.List")
    assert relative_error(of(plan), of(None)) <= 1e-5
    assert "Block.__call__" in NnxBlock.__call__.__qualname__
    assert not hasattr(NnxBlock.__call__, "__wrapped__")


@pytest.mark.slow
@pytest.mark.parametrize("of", (of_equinox, of_nnx))
def test_blocks_are_run_again(of):
    if not hasattr(nnx, "List"):
        pytest.skip("this Flax has no nnx.List")
    counts = {}
    for plan in (None, "none", "full"):
        counter = Counter()
        jax.block_until_ready(of(plan, counter))
        jax.effects_barrier()
        counts[plan] = counter.total
    assert counts == {None: L, "none": L, "full": 2 * L}


def test_an_inherited_method_is_taken_off_again():
    class Child(Block):
        pass

    child = Child(jax.random.key(0))
    with jaxckpt.remat_of(Child, "full"):
        assert "__call__" in vars(Child)
        child(X)
        with (
            pytest.raises(ValueError, match="no Linear was called under remat_of"),
            jaxckpt.remat_of(eqx.nn.Linear, "dots"),
        ):
            pass
    assert "__call__" not in vars(Child)


@pytest.mark.parametrize(
    ("of", "block", "plan", "options", "message"),
    [
        (jaxckpt.remat_of, Block, "sqrt", {}, "speaks of several blocks, remat_of wraps one"),
        (jaxckpt.remat_of, jnp.tanh, "full", {}, "remat_of takes a class, not tanh"),
        (jaxckpt.remat_of, Block, "full", {"methods": ("f",)}, "Block has no method 'f'"),
        (jaxckpt.remat_of, eqx.nn.GRUCell, "full", {}, "no GRUCell was called under remat_of, so"),
        (jaxckpt.nnx.remat_of, Block, "full", {}, "nnx.remat_of takes a class of NNX modules, not"),
        (jaxckpt.nnx.remat_of, nnx.LSTMCell, "full", {}, "no LSTMCell was called under nnx.remat"),
    ],
)
def test_bad_input(of, block, plan, options, message):
    with pytest.raises(ValueError, match=message), of(block, plan, **options):
        pass
