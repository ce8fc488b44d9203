"""`tiled`: values and gradients of the whole function, tile by tile, twice in all under a block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt.costs.flops import count_flops
from tests.transforms.cases import relative_error

KEY = jax.random.key(0)
B, S, D, F = 2, 10, 8, 24
W = {
    "up": jax.random.normal(jax.random.fold_in(KEY, 1), (D, F)),
    "down": jax.random.normal(jax.random.fold_in(KEY, 2), (F, D)),
}
X = jax.random.normal(KEY, (B, S, D))
SHIFT = jnp.linspace(-1, 1, D)


def mlp(x, w):
    return jnp.tanh((x + SHIFT) @ w["up"]) @ w["down"]


def value_and_grads(fn, x=X, w=W):
    return jax.value_and_grad(lambda w, x: jnp.sin(fn(x, w)).sum(), (0, 1))(w, x)


@pytest.mark.slow
@pytest.mark.parametrize("num_tiles", [1, 2, 3, 4, 10, 64])
@pytest.mark.parametrize("axis", [1, -2])
def test_values_and_gradients_are_those_of_the_whole(num_tiles, axis):
    """3, 4 and 64 do not divide 10 positions: the last tile is shorter, or there are fewer."""
    expected = jax.jit(lambda: value_and_grads(mlp))()
    found = jax.jit(lambda: value_and_grads(jaxckpt.tiled(mlp, num_tiles, axis)))()
    assert relative_error(found, expected) < 1e-5  # sums over positions associate differently


def test_what_it_closes_over_has_gradients_and_arguments_may_be_of_any_kind():
    def loss(shift, rotary, tiles):
        def fn(tree, is_on, ids):
            y = tree["x"] * shift + jnp.where(is_on, rotary[0], 0)
            return {"y": y, "ids": tree["ids"] + ids}

        fn = jaxckpt.tiled(fn, tiles, axis=0)
        found = fn({"x": X[0], "ids": jnp.arange(S)}, True, jnp.arange(1))
        return jnp.square(found["y"]).sum(), found["ids"]

    grads = jax.value_and_grad(loss, (0, 1), has_aux=True)
    found, expected = grads(SHIFT, jnp.ones([1, D]), 3), grads(SHIFT, jnp.ones([1, D]), 1)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.slow
def test_under_vmap_and_hessian_vector_products():
    tiles = jaxckpt.tiled(mlp, 3)
    wide = jnp.stack([X, 2 * X])
    by_example = lambda fn: jax.vmap(lambda x: value_and_grads(fn, x=x))(wide)
    assert relative_error(by_example(tiles), by_example(mlp)) < 1e-5
    loss = lambda fn, x: jnp.sin(fn(x, W)).sum()
    product = lambda fn: jax.jvp(jax.grad(functools.partial(loss, fn)), (X,), (X,))
    assert relative_error(product(tiles), product(mlp)) < 1e-5


def block(fn):
    return jax.checkpoint(lambda x, w: x + fn(jax.nn.standardize(x), w))


@pytest.mark.parametrize("num_tiles", [2, 3, 5])
def test_runs_twice_under_a_checkpointed_block(num_tiles):
    """Forward once; then each tile forward and reversed at once: 2 + 1 + 4 products.

    Nobody reads the last product of the second run. The twin: without a checkpoint there is none.
    """
    product = 2 * B * S * D * F
    flops = lambda fn: count_flops(jax.make_jaxpr(lambda: value_and_grads(fn))()) / product
    assert flops(block(jaxckpt.tiled(mlp, num_tiles))) == 7
    assert flops(jaxckpt.tiled(mlp, num_tiles)) == 7  # alone, it is its own checkpoint
    assert flops(block(mlp)) == 7
    assert flops(mlp) == 6


def test_gradients_of_weights_are_summed_in_float32():
    x, w = jnp.ones([1, 4096, 1], jnp.bfloat16), jnp.ones([1, 1], jnp.bfloat16)
    fn = lambda x, w: x @ w
    grad = lambda fn: jax.grad(lambda w: fn(x, w).astype(jnp.float32).sum())(w)
    assert float(grad(jaxckpt.tiled(fn, 4096))[0, 0]) == 4096  # in bfloat16 the sum stops at 256


@pytest.mark.slow
def test_temporary_bytes_on_an_absent_tpu():
    """The twin: a stack whose MLP is whole needs its hidden values at once."""

    def step(num_tiles, w, x):
        fn = jaxckpt.tiled(mlp, num_tiles) if num_tiles else mlp
        run = lambda x, w: x + fn(x, w)
        loss = lambda w, x: jaxckpt.scan_blocks(run, w, x, remat="full").sum()
        return jax.grad(loss)(w, x)

    def temp(num_tiles):
        w = {"up": jax.ShapeDtypeStruct((4, 256, 2048), "float32")}
        w["down"] = jax.ShapeDtypeStruct((4, 2048, 256), "float32")
        x = jax.ShapeDtypeStruct((1, 8192, 256), "float32")
        fn = functools.partial(step, num_tiles)
        globals()["SHIFT"] = jnp.zeros([256])
        try:
            report = jaxckpt.measure(fn, w, x, target="v5e-1")
            return report.peak_bytes - report.argument_bytes - report.output_bytes
        finally:
            globals()["SHIFT"] = jnp.linspace(-1, 1, D)

    assert temp(8) < 0.5 * temp(0)


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (lambda x, w: x.sum(1), "not position-wise along axis 1: 10 positions give"),
        (lambda x, w: x[:, :3], "not position-wise"),
        (lambda x, w: jnp.swapaxes(x, 1, 2), "not position-wise"),
    ],
)
def test_a_function_of_other_shapes_is_refused(fn, match):
    with pytest.raises(ValueError, match=match):
        jaxckpt.tiled(fn, 2)(X, W)


def test_a_function_that_mixes_positions_is_found_by_values():
    mixes = lambda x, w: x - x.mean(1, keepdims=True)
    jaxckpt.tiled(mixes, 2)(X, W)  # shapes do not tell
    with pytest.raises(ValueError, match="a position of y depends on other positions of x"):
        jax.jit(jaxckpt.tiled(mixes, 2, check=True))(X, W)
    jax.jit(jaxckpt.tiled(mlp, 2, check=True))(X, W)
    key = jax.random.key(1)
    jaxckpt.tiled(lambda x, key: x, 2, check=True)(X, key)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: jaxckpt.tiled(3, 2), "tiled takes a function, not 3"),
        (lambda: jaxckpt.tiled(mlp, 0), "num_tiles is a whole number, at least 1, not 0"),
        (lambda: jaxckpt.tiled(mlp, 2.0), "num_tiles is a whole number"),
        (lambda: jaxckpt.tiled(mlp, 2, axis=4)(X, W), "has no axis 4"),
        (lambda: jaxckpt.tiled(mlp, 2)((X, X[:, :3]), W), r"positions on axis 1"),
        (lambda: jaxckpt.tiled(mlp, 2)((), W), "no positions"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_forward_mode_by_itself_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="tiled has reverse mode"):
        jax.jvp(lambda x: jaxckpt.tiled(mlp, 2)(x, W), (X,), (X,))
    assert np.isfinite(X).all()
