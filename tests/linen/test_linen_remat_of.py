"""`linen.remat_of`: a class that is checkpointed wherever it is called, its code left as it is."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import jaxckpt
from tests.transforms.cases import Counter, relative_error

L, WIDTH = 4, 8
X = jnp.linspace(-1, 1, 64 * WIDTH).reshape(64, WIDTH)
RNGS = {"dropout": jax.random.key(1)}


class Block(nn.Module):
    """Flags by keyword decide what is computed, as in models of a hub."""

    counter: Counter | None = None

    @nn.compact
    def __call__(self, x, mask=None, deterministic=True, output_attentions=False):
        if self.counter is not None:
            jax.debug.callback(lambda _: self.counter(0), x[0, 0])
        y = nn.Dense(4 * WIDTH)(nn.BatchNorm(use_running_average=deterministic)(x))
        y = nn.Dropout(0.2, deterministic=deterministic)(jnp.tanh(y))
        if mask is not None:
            y = y * mask
        x = x + nn.Dense(WIDTH)(y)
        self.sow("intermediates", "mean", y.mean())
        return (x, y) if output_attentions else (x,)


class Listed(nn.Module):
    """Makes its blocks in `setup`, or where they are called."""

    counter: Counter | None = None

    def setup(self):
        self.blocks = [Block(self.counter) for _ in range(L)]

    def __call__(self, x):
        for block in self.blocks:
            x = block(x, deterministic=False, output_attentions=False)[0]
        return x


class Inline(Listed):
    def setup(self):
        pass

    @nn.compact
    def __call__(self, x):
        for _ in range(L):
            x = Block(self.counter)(x, deterministic=False, output_attentions=False)[0]
        return x


def gradients(model, variables, plan=None, **options):
    def loss(params):
        apply = functools.partial(model.apply, rngs=RNGS, mutable=["batch_stats", "intermediates"])
        if plan is None:
            x, state = apply({**variables, "params": params}, X)
        else:
            with jaxckpt.linen.remat_of(Block, plan, **options):
                x, state = apply({**variables, "params": params}, X)
        return jnp.sin(x).sum(), state

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


@pytest.mark.slow
@pytest.mark.parametrize("plan", ("none", "full", "dots"))
@pytest.mark.parametrize("kind", (Listed, Inline))
def test_values_names_and_state_stay(kind, plan):
    variables = kind().init(RNGS | {"params": jax.random.key(0)}, X)
    found, want = (gradients(kind(), variables, one) for one in (plan, None))
    assert jax.tree.structure(found) == jax.tree.structure(want)
    assert relative_error(found, want) <= 1e-5


@pytest.mark.slow
def test_init_makes_the_models_parameters():
    made = {}
    for plan in (None, "full"):
        if plan is None:
            made[plan] = Inline().init(RNGS | {"params": jax.random.key(0)}, X)
        else:
            with jaxckpt.linen.remat_of(Block, plan):
                made[plan] = Inline().init(RNGS | {"params": jax.random.key(0)}, X)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *made.values()))


@pytest.mark.slow
def test_blocks_are_run_again():
    counts = {}
    for plan in (None, "none", "full"):
        counter = Counter()
        model = Inline(counter)
        variables = model.init(RNGS | {"params": jax.random.key(0)}, X)
        jax.effects_barrier()
        before = counter.total
        jax.block_until_ready(gradients(model, variables, plan))
        jax.effects_barrier()
        counts[plan] = counter.total - before
    assert counts == {None: L, "none": L, "full": 2 * L}


def test_a_class_that_was_called_once_is_missed_where_it_is_not():
    dense, other = nn.Dense(WIDTH), nn.Sequential([jnp.tanh])
    variables = dense.init(jax.random.key(0), X)
    with jaxckpt.linen.remat_of(nn.Dense, "full"):
        dense.apply(variables, X)
    with (
        pytest.raises(ValueError, match=r"no Dense was called .*; called were Sequential"),
        jaxckpt.linen.remat_of(nn.Dense, "full"),
    ):
        other.apply({}, X)


def test_around_a_jitted_step():
    """What was traced before is traced again, and a second step is not an error."""
    model = nn.Sequential([nn.Dense(WIDTH), jnp.tanh, nn.Dense(WIDTH)])
    params = model.init(jax.random.key(0), X)
    step = jax.jit(jax.grad(lambda params: jnp.sin(model.apply(params, X)).sum()))
    has_remat = lambda: "remat" in str(step.trace(params).jaxpr)
    step(params)
    assert not has_remat()
    for _ in range(2):
        with jaxckpt.linen.remat_of(nn.Sequential, "full"):
            step(params)
            assert has_remat()
    assert not has_remat()


@pytest.mark.parametrize(
    ("block", "plan", "options", "message"),
    [
        (Block, "sqrt", {}, "speaks of several blocks, linen.remat_of wraps one"),
        (Block, "offload:carry", {}, "linen.Stack takes it"),
        (Block(), "full", {}, "linen.remat_of takes a Linen module class, not"),
        (functools.partial(Block), "full", {}, "linen.remat_of takes a Linen module class, not"),
        (Block, "full", {"methods": ("encode",)}, "Block has no method 'encode'"),
        (Block, "names:nothing", {}, "names:nothing"),
        (nn.LSTMCell, "full", {}, "no LSTMCell was called under linen.remat_of, .*called were Inl"),
    ],
)
def test_bad_input(block, plan, options, message):
    model = Inline()
    variables = model.init(RNGS | {"params": jax.random.key(0)}, X)
    with (
        pytest.raises(ValueError, match=message) as caught,
        jaxckpt.linen.remat_of(block, plan, **options),
    ):
        model.apply(variables, X, rngs=RNGS, mutable=["batch_stats"])
    assert "\n" not in str(caught.value)
