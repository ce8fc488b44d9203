"""`jaxckpt.run`: a list of layers as it is, beside a plain loop over it."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.costs.flops import count_flops
from tests.transforms.cases import Counter, relative_error

L, WIDTH = 6, 8
PLANS = ("none", "full", "dots", "sqrt", "log", "binomial:2", "uniform:2", "2xfull/sqrt")
X = jnp.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)
KEYS = jax.random.split(jax.random.key(7), L)


class Layer(eqx.Module):
    """A residual MLP with dropout: static fields, and a function as a leaf."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    act: Any
    layer_idx: int = eqx.field(static=True)

    def __init__(self, index, key, width=2 * WIDTH):
        keys = jax.random.split(key)
        self.up = eqx.nn.Linear(WIDTH, width, key=keys[0])
        self.down = eqx.nn.Linear(width, WIDTH, key=keys[1])
        self.dropout = eqx.nn.Dropout(0.3)
        self.act = jax.nn.gelu
        self.layer_idx = index

    def __call__(self, x, scale, *, key, counter=None):
        if counter is not None:
            jax.debug.callback(lambda _: counter(0), x[0, 0])
        hidden = self.act(jax.vmap(self.up)(x))
        made = x + scale * self.dropout(jax.vmap(self.down)(hidden), key=key)
        return made, hidden.mean()


LAYERS = [Layer(i, key) for i, key in enumerate(jax.random.split(jax.random.key(0), L))]


def loop(layers, x, scale):
    means = []
    for i, layer in enumerate(layers):
        x, mean = layer(x, scale, key=KEYS[i])
        means.append(mean)
    return x, jnp.stack(means)


def ours(layers, x, scale, plan, **options):
    apply = lambda layer, x, scale, key: layer(x, scale, key=key)
    options = {"each": {"key": KEYS}, "out": 0, "ignore": "layer_idx"} | options
    return jaxckpt.run(layers, apply, x, scale, remat=plan, **options)


def gradients(run):
    def loss(args):
        x, means = run(*args)
        return jnp.sin(x).sum() + (jnp.arange(1.0, L + 1) * means).sum()

    return eqx.filter_jit(eqx.filter_value_and_grad(loss))((LAYERS, X, jnp.float32(0.7)))


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_a_list_of_equinox_layers(plan):
    """Loss and gradients of the list itself, with dropout, flags and an output a layer."""
    (value, grads), (expected, expected_grads) = map(
        gradients, (lambda *args: ours(*args, plan), loop)
    )
    assert isinstance(grads[0][0], Layer) and len(grads[0]) == L
    arrays = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    found = relative_error((value, arrays(grads)), (expected, arrays(expected_grads)))
    assert found <= 1e-5


@pytest.mark.slow
def test_layers_are_run_again():
    """The twin: how often a layer runs, and what the products of a gradient cost."""
    counts = {}
    for plan in ("none", "full", "uniform:2"):
        counter = Counter()
        apply = lambda layer, x, key, c=counter: layer(x, 0.5, key=key, counter=c)[0]
        options = {"each": {"key": KEYS}, "ignore": "layer_idx", "remat": plan}
        arrays, static = eqx.partition(LAYERS, eqx.is_array)
        loss = lambda a, s=static, f=apply, o=options: jaxckpt.run(
            eqx.combine(a, s), f, X, **o
        ).sum()
        jax.block_until_ready(jax.jit(jax.grad(loss))(arrays))
        jax.effects_barrier()
        counts[plan] = counter.total
    assert counts == {"none": L, "full": 2 * L, "uniform:2": 2 * L - 3}


@pytest.mark.slow
def test_unrolled_layers_are_not_copied():
    wide = [Layer(i, jax.random.key(i), width=4096) for i in range(L)]
    arrays, static = eqx.partition(wide, eqx.is_array)

    def temp(**options):
        apply = lambda layer, x, key: layer(x, 0.5, key=key)[0]
        fn = lambda a: jaxckpt.run(
            eqx.combine(a, static), apply, X, each={"key": KEYS}, ignore="layer_idx", **options
        )
        return jaxckpt.measure(fn, arrays).temp_bytes

    size = sum(x.nbytes for x in jax.tree.leaves(arrays))
    assert temp(remat="full") >= size > 4 * temp(remat="full", unroll=L)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Weights:
    """A plain dataclass of arrays."""

    w: jax.Array
    parts: dict[str, jax.Array]


def test_a_list_of_dataclasses_with_a_function():
    layers = [
        Weights(w=0.3 * jax.random.normal(key, (WIDTH, WIDTH)), parts={"b": jnp.full(WIDTH, 0.1)})
        for key in KEYS
    ]
    apply = lambda layer, x, flag: jnp.tanh(x @ layer.w + layer.parts["b"]) if flag else x

    def plain(layers):
        x = X
        for layer in layers:
            x = apply(layer, x, True)
        return x.sum()

    run = lambda layers: jaxckpt.run(layers, apply, X, True, remat="sqrt").sum()
    found, expected = jax.grad(run)(layers), jax.grad(plain)(layers)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert relative_error(found, expected) <= 1e-6
    traced = lambda fn: count_flops(jax.make_jaxpr(jax.grad(fn))(layers))
    assert traced(run) > 1.2 * traced(plain)


def changed(**changes):
    """The layers, the last of them changed."""
    last = LAYERS[-1]
    for name, value in changes.items():
        last = eqx.tree_at(lambda layer, n=name: getattr(layer, n), last, value)
    return [*LAYERS[:-1], last]


OTHER = eqx.nn.Linear(WIDTH, 2 * WIDTH, use_bias=False, key=KEYS[0])


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([], {}, "layers is an empty list"),
        (LAYERS, {"ignore": ()}, r"layers\[0\].layer_idx is 0 and layers\[1\].layer_idx is 1"),
        (LAYERS, {"ignore": "layer_id"}, r"layer_idx is 0 .*ignore='layer_idx'"),
        (
            changed(act=jax.nn.relu)[-2:],
            {"each": {"key": KEYS[:2]}},
            r"layers\[0\].act is .*relu.*jaxckpt.chain",
        ),
        (
            changed(up=OTHER)[-2:],
            {"each": {"key": KEYS[:2]}},
            r"layers\[0\].up.bias is float32\[16\] and layers\[1\].up.bias is None",
        ),
        (LAYERS, {"each": {"key": KEYS[:4]}}, r"each\['key'\] has 4 rows, there are 6 layers"),
        (
            changed(up=OTHER)[-2:],
            {"ignore": ("layer_idx", "bias"), "each": {"key": KEYS[:2]}},
            r"no two layers are equal: .* of which one has two layers, jaxckpt.chain",
        ),
        (LAYERS, {"each": KEYS}, r"each is a dict from a keyword .* not key<fry>\[6\]"),
        (LAYERS, {"each": {"key": list(KEYS)}}, r"is a scalar; every leaf is .*stack a list"),
        (
            LAYERS,
            {"each": {"key": list(jax.random.key_data(KEYS))}},
            r"each\['key'\] has 2 rows, there are 6 layers; stack a list",
        ),
        (LAYERS, {"each": {"key": None}}, r"each\['key'\] has no arrays"),
        (LAYERS, {"unroll": "2"}, "unroll is a whole number of blocks, at least 1, not '2'"),
        (LAYERS, {"out": 2}, "out=2 is the place of the carry"),
        (LAYERS, {"out": None}, "the structure changes.* take out=, the place of the carry"),
        (LAYERS, {"out": 1}, "carry changes"),
    ],
)
def test_bad_input(layers, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        ours(layers, X, 0.5, "full", **options)
    assert "\n" not in str(caught.value)
