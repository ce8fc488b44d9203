"""`carry=` of the stacks: batch statistics and sown values, a row a block, changed once a call."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import jaxckpt
from tests.transforms.cases import Counter, relative_error

L, WIDTH = 5, 6
X = jnp.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)
PLANS = ("none", "full", "sqrt", "binomial:2", "uniform:2", "2xfull/log")
RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
STATE = ("batch_stats", "intermediates")


class LinenBlock(linen.Module):
    fixed: bool = False
    counter: Counter | None = None

    @linen.compact
    def __call__(self, x):
        if self.counter is not None:
            jax.debug.callback(lambda _: self.counter(0), x[0, 0])
        y = linen.BatchNorm(use_running_average=self.fixed, momentum=0.5)(linen.Dense(WIDTH)(x))
        self.sow("intermediates", "loss", jnp.square(y).mean())
        return x + jnp.tanh(y)


def by_hand(variables, fixed=False):
    """A loop over the rows of a stack; returns what a stack returns."""
    x, states = X, []
    for i in range(L):
        row = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        x, state = LinenBlock(fixed).apply(row, x, mutable=list(STATE))
        states.append(state)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def gradients(run, variables):
    def loss(params):
        x, state = run({**variables, "params": params})
        return jnp.sin(x).sum() + state["intermediates"]["loss"][0].sum(), state

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_linen(plan):
    """Statistics, sown losses and gradients; two steps, as each reads the last one's state."""
    stack = jaxckpt.linen.Stack(LinenBlock, L, remat=plan, carry=STATE)
    variables = stack.init(RNGS, X)
    assert variables["batch_stats"]["BatchNorm_0"]["mean"].shape == (L, WIDTH)
    for _ in range(2):
        run = lambda variables: stack.apply(variables, X, mutable=list(STATE))
        found, want = gradients(run, variables), gradients(by_hand, variables)
        assert jax.tree.structure(found) == jax.tree.structure(want)
        assert relative_error(found, want) <= 1e-5
        variables = {**variables, "batch_stats": found[0][1]["batch_stats"]}
    # Without `mutable`, fixed averages: a state that nothing changes.
    fixed = jaxckpt.linen.Stack(functools.partial(LinenBlock, True), L, remat=plan)
    assert relative_error(fixed.apply(variables, X), by_hand(variables, True)[0]) <= 1e-6
    assert "batch_stats" in fixed.init(RNGS, X)


@pytest.mark.slow
def test_blocks_with_state_are_run_again():
    counts = {}
    for plan in ("none", "full", "uniform:2"):
        counter = Counter()
        block = functools.partial(LinenBlock, counter=counter)
        stack = jaxckpt.linen.Stack(block, L, remat=plan, carry=STATE)
        variables = stack.init(RNGS, X)
        jax.effects_barrier()
        counter.counts.clear()
        run = lambda v, stack=stack: stack.apply(v, X, mutable=list(STATE))
        jax.block_until_ready(gradients(run, variables))
        jax.effects_barrier()
        counts[plan] = counter.total
    assert counts == {"none": L, "full": 2 * L, "uniform:2": 2 * L - 3}


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.dropout(self.norm(self.dense(x))))


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_nnx(plan):
    def run(plan):
        stack = jaxckpt.nnx.Stack(NnxBlock, L, remat=plan, carry=nnx.BatchStat, rngs=nnx.Rngs(0))
        step = nnx.value_and_grad(lambda stack: jnp.sin(stack(X)).sum())
        made = [step(stack) for _ in range(2)]
        state = nnx.to_pure_dict(nnx.state(stack, nnx.BatchStat))
        return [(value, nnx.to_pure_dict(grads)) for value, grads in made], state

    found, want = run(plan), run("none")
    assert relative_error(found, want) <= 1e-5
    # The first block's mean after two calls, each of which it saw once.
    rngs = nnx.Rngs(0)
    stack = jaxckpt.nnx.Stack(NnxBlock, L, remat="none", carry=nnx.BatchStat, rngs=rngs)
    mean = (X @ stack.blocks.dense.kernel[0] + stack.blocks.dense.bias[0]).mean(0)
    assert relative_error(found[1]["blocks"]["norm"]["mean"][0], 0.75 * mean) <= 1e-5


def test_one_collection_may_be_given_by_its_name():
    stack = jaxckpt.linen.Stack(LinenBlock, L, carry="batch_stats")
    variables = stack.init(RNGS, X)
    state = stack.apply(variables, X, mutable=["batch_stats"])[1]
    assert not jnp.array_equal(
        *(one["batch_stats"]["BatchNorm_0"]["mean"] for one in (state, variables))
    )
    with pytest.raises(ValueError, match=r"keeps state in intermediates\.loss\.0.*carry=\('inter"):
        stack.apply(variables, X, mutable=["batch_stats", "intermediates"])
