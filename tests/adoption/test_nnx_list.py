"""An NNX decoder as sharded models have it: metadata that names axes, a cache, `(cache, x)`."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxckpt
from tests.adoption.cases import changed_lines, check, check_fit

L, WIDTH, HEADS = 6, 32, 4
X = jax.random.normal(jax.random.key(0), (32, 32, WIDTH))
POSITIONS = jnp.broadcast_to(jnp.arange(32), (32, 32))
MASK = jnp.tril(jnp.ones([1, 1, 32, 32], bool))


@pytest.fixture(autouse=True)
def mesh():
    """One that the layers' metadata names."""
    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((1,), ("fsdp",), axis_types=auto)):
        yield


def linear(*shape, rngs, names):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
    return nnx.Linear(*shape, use_bias=False, kernel_init=init, rngs=rngs)


class Layer(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.qkv = linear(WIDTH, 3 * WIDTH, rngs=rngs, names=("fsdp", None))
        self.output = linear(WIDTH, WIDTH, rngs=rngs, names=(None, "fsdp"))
        self.gate = linear(WIDTH, 4 * WIDTH, rngs=rngs, names=("fsdp", None))
        self.down = linear(4 * WIDTH, WIDTH, rngs=rngs, names=(None, "fsdp"))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x, positions, cache, mask):
        y = self.norm(x) * jnp.cos(positions[..., None])
        query, key, value = jnp.split(self.qkv(y).reshape(*x.shape[:2], HEADS, -1), 3, -1)
        if cache is not None:
            key, value = (
                jnp.concatenate(pair, 1) for pair in zip(cache, (key, value), strict=True)
            )
            cache = (key, value)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        weights = nnx.softmax(jnp.where(mask, scores, -1e9))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        x = x + self.dropout(self.output(y))
        return cache, x + self.dropout(self.down(nnx.silu(self.gate(x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = getattr(nnx, "List", list)([Layer(rngs=rngs) for _ in range(L)])

    def __call__(self, x, positions, cache, mask):
        new_cache = None if cache is None else {}
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache[i]
            layer_cache, x = layer(x, positions, layer_cache, mask)
            if cache is not None:
                new_cache[i] = layer_cache
        return new_cache, x


class Adopted(Model):
    remat = "full"

    def __call__(self, x, positions, cache, mask):
        if cache is None:
            options = {"out": 1, "remat": self.remat}
            return jaxckpt.nnx.run(self.layers, x, positions, None, mask, **options)
        new_cache = None if cache is None else {}
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache[i]
            layer_cache, x = layer(x, positions, layer_cache, mask)
            if cache is not None:
                new_cache[i] = layer_cache
        return new_cache, x


def loss_of(model):
    graph, _, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        rows = jax.tree.map(jnp.array, rest)
        cache, x = nnx.merge(graph, params, rows)(x, POSITIONS, None, MASK)
        assert cache is None
        return jnp.square(x).mean()

    return loss


@pytest.mark.slow
def test_fit():
    def loss_under(plan):
        model = Adopted(nnx.Rngs(0))
        model.remat = plan
        return loss_of(model)

    params = nnx.state(Adopted(nnx.Rngs(0)), nnx.Param)
    check_fit(loss_under, L, params, X)


@pytest.mark.slow
def test_weights_metadata_and_masks_are_the_models():
    assert changed_lines(Model.__call__, Adopted.__call__) <= 3
    models = [kind(nnx.Rngs(0)) for kind in (Model, Adopted)]
    check(*map(loss_of, models), nnx.state(models[0], nnx.Param), X)
    specs = [nnx.get_partition_spec(nnx.state(model)) for model in models]
    assert jax.tree.leaves(specs[0]) == jax.tree.leaves(specs[1])
    # The counters of dropout go on as in the loop, and a cache takes the loop as before.
    for model in models:
        model(X, POSITIONS, None, MASK)
    counts = [[int(x) for x in jax.tree.leaves(nnx.state(m, nnx.RngCount))] for m in models]
    assert counts[0] == counts[1] and set(counts[0]) == {2}
