"""`out=` of the stacks: what a block returns beside its carry comes back, a row a block."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import jaxckpt
from tests.transforms.cases import Counter, relative_error

L, WIDTH = 5, 6
X = jnp.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)
PLANS = ("none", "full", "dots", "sqrt", "binomial:2", "uniform:2", "2xfull/log")
RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


class LinenBlock(linen.Module):
    kind: str = "tuple"
    counter: Counter | None = None

    @linen.compact
    def __call__(self, x, scale):
        if self.counter is not None:
            jax.debug.callback(lambda _: self.counter(0), x[0, 0])
        hidden = linen.tanh(linen.Dense(WIDTH)(x))
        x = x + scale * linen.Dropout(0.3, deterministic=False)(hidden)
        weights = linen.softmax(hidden)
        made = {"tuple": (weights, x, {"loss": weights.var()}), "dict": {"x": x, "w": weights}}
        return made[self.kind]


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x, scale):
        hidden = nnx.tanh(self.dense(x))
        return x + scale * self.dropout(hidden), hidden.mean()


def value(result):
    """A loss that reads every output."""
    weights, x, aux = result
    return jnp.sin(x).sum() + (weights**2).sum() + aux["loss"].sum()


@pytest.mark.heavy
@pytest.mark.parametrize("plan", PLANS)
def test_linen(plan):
    """Beside `none`, with dropout; what the blocks return is what a loop of them returns."""
    stack = lambda plan: jaxckpt.linen.Stack(LinenBlock, L, remat=plan, out=1)
    variables = stack("none").init(RNGS, X, 0.5)
    run = lambda v, plan: value(stack(plan).apply(v, X, 0.5, rngs=RNGS))
    assert relative_error(jax.grad(run)(variables, plan), jax.grad(run)(variables, "none")) <= 1e-6
    weights, x, aux = stack(plan).apply(variables, X, 0.5, rngs=RNGS)
    assert weights.shape == (L, *X.shape) and aux["loss"].shape == (L,) and x.shape == X.shape
    # The first block's weights do not depend on dropout.
    first = jax.tree.map(lambda leaf: leaf[0], variables["params"]["Dense_0"])
    by_hand = linen.softmax(jnp.tanh(X @ first["kernel"] + first["bias"]))
    assert relative_error(weights[0], by_hand) <= 1e-6


@pytest.mark.slow
def test_blocks_with_outputs_are_run_again():
    counts = {}
    for plan in ("none", "full", "uniform:2"):
        counter = Counter()
        block = functools.partial(LinenBlock, counter=counter)
        stack = jaxckpt.linen.Stack(block, L, remat=plan, out=1)
        variables = stack.init(RNGS, X, 0.5)
        jax.effects_barrier()
        counter.counts.clear()
        run = lambda v, s=stack: value(s.apply(v, X, 0.5, rngs=RNGS))
        jax.block_until_ready(jax.jit(jax.grad(run))(variables))
        jax.effects_barrier()
        counts[plan] = counter.total
    assert counts == {"none": L, "full": 2 * L, "uniform:2": 2 * L - 3}


@pytest.mark.slow
def test_a_key_a_function_and_a_last_place():
    make = lambda kind, out: jaxckpt.linen.Stack(
        functools.partial(LinenBlock, kind=kind), L, remat="log", out=out
    )
    variables = make("dict", "x").init(RNGS, X, 0.5)
    run = lambda kind, out: make(kind, out).apply(variables, X, 0.5, rngs=RNGS)
    made = run("dict", "x")
    assert set(made) == {"x", "w"} and made["w"].shape == (L, *X.shape)
    assert jnp.array_equal(run("dict", lambda made: made["x"]), made["x"])
    assert jnp.array_equal(run("tuple", -2)[1], made["x"])


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_nnx(plan):
    def run(plan, seed=0):
        stack = jaxckpt.nnx.Stack(NnxBlock, L, remat=plan, out=0, rngs=nnx.Rngs(seed))

        def loss(stack):
            x, means = stack(X, 0.5)
            return jnp.sin(x).sum() + (jnp.arange(1.0, L + 1) * means).sum()

        value, grads = nnx.value_and_grad(loss)(stack)
        return value, jax.tree.leaves(nnx.to_pure_dict(grads))

    assert relative_error(run(plan), run("none")) <= 1e-6


@pytest.mark.parametrize("out", [3, "x"])
def test_a_wrong_place_is_named(out):
    stack = jaxckpt.linen.Stack(LinenBlock, L, out=out)
    with pytest.raises(ValueError, match=f"out={out!r} is the place of the carry"):
        stack.init(RNGS, X, 0.5)


def test_without_out_a_pair_is_refused():
    stack = jaxckpt.linen.Stack(LinenBlock, L)
    with pytest.raises(ValueError, match="structure changes"):
        stack.apply(stack.init(RNGS, X, 0.5), X, 0.5, rngs=RNGS)
