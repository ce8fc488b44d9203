"""An NNX decoder as sharded models have it: metadata that names axes, a cache, `(cache, x)`."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxckpt
from tests.adoption.cases import attention, changed_lines, check, check_fit, product

L, BATCH, LENGTH, WIDTH, HEADS = 6, 32, 32, 32, 4


def mesh():
    """Returns a context with the mesh that the layers' metadata names."""
    auto = (jax.sharding.AxisType.Auto,)
    return jax.set_mesh(jax.make_mesh((1,), ("fsdp",), axis_types=auto))


@pytest.fixture(autouse=True)
def in_mesh():
    with mesh():
        yield


def linear(*shape, rngs, names):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
    return nnx.Linear(*shape, use_bias=False, kernel_init=init, rngs=rngs)


class Layer(nnx.Module):
    def __init__(self, width, *, rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.qkv = linear(width, 3 * width, rngs=rngs, names=("fsdp", None))
        self.output = linear(width, width, rngs=rngs, names=(None, "fsdp"))
        self.gate = linear(width, 4 * width, rngs=rngs, names=("fsdp", None))
        self.down = linear(4 * width, width, rngs=rngs, names=(None, "fsdp"))
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
    def __init__(self, depth=L, width=WIDTH):
        rngs = nnx.Rngs(0)
        self.layers = getattr(nnx, "List", list)([Layer(width, rngs=rngs) for _ in range(depth)])

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
        cache, x = nnx.merge(graph, params, rows)(x, *positions_and_mask(x))
        assert cache is None
        return jnp.square(x).mean()

    return loss


def positions_and_mask(x):
    """Returns what a layer takes beside its input: positions, no cache and a mask."""
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return positions, None, jnp.tril(jnp.ones([1, 1, *x.shape[1:2] * 2], bool))


def arguments(depth=L, batch=BATCH, length=LENGTH, width=WIDTH):
    """Returns the arguments of both losses."""
    x = jax.random.normal(jax.random.key(0), (batch, length, width))
    return nnx.state(Model(depth, width), nnx.Param), x


def pair(depth=L, width=WIDTH, **sizes):
    """Returns the losses of both models under `full`, and their arguments."""
    losses = [loss_of(kind(depth, width)) for kind in (Model, Adopted)]
    return *losses, *arguments(depth, width=width, **sizes)


@pytest.mark.heavy
def test_fit():
    def loss_under(plan):
        model = Adopted()
        model.remat = plan
        return loss_of(model)

    check_fit(loss_under, L, *arguments())


@pytest.mark.slow
def test_weights_metadata_and_masks_are_the_models():
    assert changed_lines(Model.__call__, Adopted.__call__) <= 3
    tokens = BATCH * LENGTH
    again = attention(tokens, WIDTH, LENGTH) + product(tokens, WIDTH, 4 * WIDTH)
    *losses, params, x = pair()
    check(*losses, params, x, again=L * again)
    models = [kind() for kind in (Model, Adopted)]
    specs = [nnx.get_partition_spec(nnx.state(model)) for model in models]
    assert jax.tree.leaves(specs[0]) == jax.tree.leaves(specs[1])
    # The counters of dropout go on as in the loop, and a cache takes the loop as before.
    for model in models:
        model(x, *positions_and_mask(x))
    counts = [[int(x) for x in jax.tree.leaves(nnx.state(m, nnx.RngCount))] for m in models]
    assert counts[0] == counts[1] and set(counts[0]) == {2}
