"""Haiku: `jaxckpt.run` over the parameters of a model's layers, as docs/which_call.md has it."""

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.costs.flops import count_flops
from tests.transforms.cases import relative_error

hk = pytest.importorskip("haiku", reason="pip install dm-haiku")

L, WIDTH = 6, 8
X = jnp.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)
KEYS = jax.random.split(jax.random.key(1), L)


class Layer(hk.Module):
    def __call__(self, x, key):
        y = hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(4 * WIDTH)(x)))
        return x + hk.dropout(key, 0.2, y)


def of_model(call):
    """Returns a transformed model whose layers are called by `call(layer, x, key)`."""

    def model(x):
        for i in range(L):
            x = call(Layer(name=f"layer_{i}"), x, KEYS[i])
        return x

    return hk.without_apply_rng(hk.transform(model))


PLAIN = of_model(lambda layer, x, key: layer(x, key))
PARAMS = PLAIN.init(jax.random.key(0), X)
LAYER = hk.without_apply_rng(hk.transform(lambda x, key: Layer(name="layer")(x, key)))


def rows(params):
    parts = [{} for _ in range(L)]
    for name, values in params.items():
        number, _, rest = name.removeprefix("layer_").partition("/")
        parts[int(number)][f"layer/{rest}"] = values
    return parts


def run(params, x, plan):
    return jaxckpt.run(rows(params), LAYER.apply, x, each={"key": KEYS}, remat=plan)


def inside(plan):
    """Returns a transformed model whose layers are a chain, once their parameters are made."""

    def model(x):
        layers = [Layer(name=f"layer_{i}") for i in range(L)]
        blocks = [lambda x, i=i: layers[i](x, KEYS[i]) for i in range(L)]
        if hk.running_init():
            for block in blocks:
                x = block(x)
            return x
        return jaxckpt.chain(blocks, x, remat=plan)

    return hk.without_apply_rng(hk.transform(model))


def gradient(apply):
    return jax.grad(lambda params, x: jnp.sin(apply(params, x)).sum(), argnums=(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("plan", ("full", "sqrt"))
def test_gradients_are_in_the_models_own_tree(plan):
    want = jax.jit(gradient(PLAIN.apply))(PARAMS, X)
    for apply in (lambda params, x: run(params, x, plan), inside(plan).apply):
        found = jax.jit(gradient(apply))(PARAMS, X)
        assert jax.tree.structure(found) == jax.tree.structure(want)
        assert relative_error(found, want) <= 1e-6


def test_a_chain_makes_the_models_parameters():
    found = inside("sqrt").init(jax.random.key(0), X)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, PARAMS))


def test_remat_of_a_layer_runs_again_what_full_does():
    remat = of_model(lambda layer, x, key: hk.remat(layer)(x, key))
    ours = lambda params, x: run(params, x, "full")
    applies = (PLAIN.apply, remat.apply, inside("full").apply, ours)
    plain, *again = (count_flops(jax.make_jaxpr(gradient(one))(PARAMS, X)) for one in applies)
    assert plain < again[0] and len({*again}) == 1


def test_parameters_that_are_made_inside_of_a_block_are_lost():
    def model(x):
        layer = Layer(name="layer")
        return jaxckpt.scan_blocks(lambda x, key: layer(x, key), KEYS, x, remat="sqrt")

    shared = hk.without_apply_rng(hk.transform(model))
    params = shared.init(jax.random.key(0), X)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        shared.apply(params, X)
