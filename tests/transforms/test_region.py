"""`checkpoint`: a function of any shape under a plan, and what it recomputes."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import io_callback

import jaxckpt
from jaxckpt.costs.flops import count_flops
from tests.transforms.cases import relative_error

KEY = jax.random.key(0)
W = {name: jax.random.normal(jax.random.fold_in(KEY, n), (8, 8)) for n, name in enumerate("abc")}
X = jax.random.normal(KEY, (4, 8))
SHIFT = jnp.linspace(-1, 1, 8)


def region(w, x, key, *, rate, act="tanh"):
    """Two products, a skip, dropout, a value that is closed over, two results."""
    hidden = jaxckpt.tag(x @ w["a"], "hidden")
    hidden = getattr(jnp, act)(hidden + SHIFT)
    if rate:
        hidden = jnp.where(jax.random.bernoulli(key, 1 - rate, hidden.shape), hidden, 0)
    out = jnp.tanh(hidden @ w["b"]) @ w["c"]
    return {"out": out + x, "norm": jnp.square(hidden).mean()}


def value_and_grads(remat, fn=region, **options):
    def loss(w, x):
        found = jaxckpt.checkpoint(fn, remat=remat, **options)(w, x, KEY, rate=0.5)
        return jnp.sin(found["out"]).sum() + found["norm"]

    return jax.value_and_grad(loss, (0, 1))


PRODUCTS = {"none": 0, "full": 2, "dots": 0, "names:hidden": 1, "names:hidden,@dot.2": 0}
PRODUCTS |= {"full+offload:hidden": 1, "full+offload:carry": 2}
SAVES_DOTS = jax.checkpoint_policies.dots_saveable


@pytest.mark.slow
@pytest.mark.parametrize("remat", [*PRODUCTS, SAVES_DOTS])
@pytest.mark.parametrize("is_jitted", [True, False])
def test_gradients_are_those_of_the_function(remat, is_jitted):
    compiled = jax.jit if is_jitted else lambda fn: fn
    found = compiled(value_and_grads(remat))(W, X)
    assert relative_error(found, jax.jit(value_and_grads("none"))(W, X)) < 1e-6


@pytest.mark.parametrize("remat", [*PRODUCTS, SAVES_DOTS])
def test_products_that_are_run_twice(remat):
    """The twin: under `full` the two products that the backward pass reads are run again."""
    flops = lambda remat: count_flops(jax.make_jaxpr(value_and_grads(remat))(W, X))
    assert flops(remat) - flops("none") == PRODUCTS.get(remat, 0) * 2 * 4 * 8 * 8


def test_under_vmap_and_with_closed_over_parameters():
    @functools.partial(jaxckpt.checkpoint, remat="dots")
    def act(x):
        return jnp.tanh(x @ W["a"] + SHIFT)

    loss = lambda shift: jax.vmap(act)(X + shift).sum()
    plain = lambda shift: jax.vmap(act.__wrapped__)(X + shift).sum()
    assert relative_error(jax.grad(loss)(SHIFT), jax.grad(plain)(SHIFT)) < 1e-6

    def over(w):
        return jaxckpt.checkpoint(lambda x: jnp.tanh(x @ w), remat="full")(X).sum()

    want = jax.grad(lambda w: jnp.tanh(X @ w).sum())(W["a"])
    assert relative_error(jax.grad(over)(W["a"]), want) < 1e-6


def test_it_keeps_its_name_and_takes_no_trace_twice():
    traced = chex.assert_max_traces(lambda w, x: jaxckpt.checkpoint(region)(w, x, KEY, rate=0.1), 1)
    step = jax.jit(traced)
    for _ in range(2):
        step(W, X)
    assert jaxckpt.checkpoint(region).__name__ == "region"
    assert jaxckpt.checkpoint(region, remat="none").__wrapped__ is region


@pytest.mark.parametrize(
    "remat, message",
    [
        ("sqrt", "plan 'sqrt' speaks of several blocks, checkpoint takes one function"),
        ("2xfull/none", "speaks of several blocks"),
        ("names:hiden", r"names:hiden matches no tag of the block \(did you mean 'hidden'\?\)"),
        ("attention", "policy 'attention' finds no attention kernel in the block"),
        ("sqrtt", "did you mean 'sqrt'"),
        ("auto", "checkpoint takes one function"),
    ],
)
def test_plans_that_a_region_cannot_follow(remat, message):
    with pytest.raises(jaxckpt.PlanError, match=message):
        value_and_grads(remat)(W, X)


def test_what_must_happen_once_and_what_is_no_function():
    def logs(w, x, key, rate):
        io_callback(lambda _: None, None, x)
        return region(w, x, key, rate=rate)

    with pytest.raises(jaxckpt.PlanError, match="an effect that must happen once"):
        value_and_grads("full", logs)(W, X)
    with pytest.raises(ValueError, match=r"checkpoint takes a function, not float32\[4, 8\]"):
        jaxckpt.checkpoint(X)
