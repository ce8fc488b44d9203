"""Unrolled blocks read their parameters when they run: no copy waits for the backward pass."""

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.memory import launch
from jaxckpt.memory.targets import parse_target
from jaxckpt.transforms import rows

BLOCKS, WIDTH = 8, 512
SHAPES = (
    jax.ShapeDtypeStruct((BLOCKS, WIDTH, WIDTH), jnp.float32),
    jax.ShapeDtypeStruct((16, WIDTH), jnp.bfloat16),
)
WEIGHTS = 4 * BLOCKS * WIDTH**2


def block(x, w):
    return x + jnp.tanh(x @ w.astype(jnp.bfloat16))


def loss(w, x):
    y = jaxckpt.scan_blocks(block, w, x, remat="full", unroll=BLOCKS)
    return y.astype(jnp.float32).sum()


@pytest.mark.parametrize("target", ["local", "h100"])
def test_rows_do_not_wait_for_the_backward_pass(target, monkeypatch):
    if target != "local":
        try:
            launch.check_available(parse_target(target))
        except launch.Unavailable as error:
            pytest.skip(str(error))
    # Each with a function of its own, so that neither is found in the other's cache.
    temp = lambda: jaxckpt.measure(jax.grad(lambda *a: loss(*a)), *SHAPES, target=target).temp_bytes
    inside = temp()
    monkeypatch.setattr(rows, "read_inside", lambda apply, items: (apply, items))
    assert inside < temp() - 0.4 * WEIGHTS


def test_gradients_and_tangents_are_those_of_a_loop():
    keys = jax.random.split(jax.random.key(0), 2)
    w = 0.05 * jax.random.normal(keys[0], (BLOCKS, 16, 16))
    params = {"w": w, "key": jax.random.split(keys[1], BLOCKS), "index": jnp.arange(BLOCKS)}

    def block(x, p):
        noise = jax.random.normal(p["key"], x.shape)
        return jnp.tanh(x @ p["w"] + noise) * (1 + p["index"])

    def run(w, unroll):
        x = jnp.linspace(-1, 1, 64).reshape(4, 16)
        y = jaxckpt.scan_blocks(block, params | {"w": w}, x, remat="full", unroll=unroll)
        return (y**2).sum()

    for unroll in (3, BLOCKS):
        reverse = [jax.grad(run)(w, n) for n in (1, unroll)]
        assert jnp.allclose(*reverse, rtol=1e-5) and jnp.abs(reverse[0]).max() > 0
        forward = [jax.jvp(lambda w, n=n: run(w, n), (w,), (w,))[1] for n in (1, unroll)]
        assert jnp.allclose(*forward, rtol=1e-5)


@pytest.mark.parametrize(
    "remat, unroll, inside",
    [("full", 8, True), ("4xfull+dots/full", 8, True), ("full", 1, False), ("none", 8, False)],
)
def test_which_stacks_read_inside(remat, unroll, inside):
    assert rows.reads_inside(remat, unroll) == inside
