"""`measure`: the rules for each number, donation, abstract arguments, FLOPs."""

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.memory.flops import count_flops
from jaxckpt.memory.report import gib

X = jnp.ones((256, 256))
SIZE = 256 * 256 * 4


def test_numbers_of_a_known_function():
    report = jaxckpt.measure(lambda x, y: (x @ y) + 1, X, X)
    assert report.argument_bytes == 2 * SIZE
    assert report.output_bytes == SIZE
    assert report.alias_bytes == 0
    assert report.peak_bytes == 3 * SIZE + report.temp_bytes
    assert report.flops == 2 * 256**3
    assert report.target == "local" and "cpu" in report.source
    assert report.jax_version == jax.__version__


def test_donation_counts_once():
    def step(x):
        return x + 1

    plain, donated = jaxckpt.measure(step, X), jaxckpt.measure(step, X, donate_argnums=0)
    assert donated.alias_bytes == SIZE
    assert donated.peak_bytes == plain.peak_bytes - SIZE
    jitted = jax.jit(step, donate_argnums=0)
    assert jaxckpt.measure(jitted, X) == donated


def test_abstract_arguments_are_enough():
    big = jax.ShapeDtypeStruct((1 << 20, 1 << 12), jnp.float32)  # 16 GiB
    assert jaxckpt.measure(lambda x: x.sum(), big).argument_bytes == 1 << 34


def test_static_arguments():
    report = jaxckpt.measure(lambda x, n: x[:n], X, 3, static_argnums=1)
    assert report.output_bytes == 3 * 256 * 4


def test_unknown_target_lists_the_valid():
    with pytest.raises(ValueError, match="target 'v5e-1' is not known; valid: local"):
        jaxckpt.measure(lambda x: x, X, target="v5e-1")


def test_text_is_a_small_table():
    text = str(jaxckpt.measure(lambda x: x @ x, X))
    assert text.splitlines()[0].startswith("memory of one step on local (XLA cpu")
    for name in ("peak", "arguments", "outputs", "temporaries", "host", "FLOPs"):
        assert name in text
    assert gib(3 * 2**30) == "3.00 GiB"


def test_flops_of_loops_calls_and_branches():
    product = 2 * 4 * 4 * 4
    x = jnp.ones((4, 4))
    count = lambda fn: count_flops(jax.make_jaxpr(fn)(x))
    assert count(lambda x: x @ x) == product
    assert count(jax.jit(lambda x: x @ x @ x)) == 2 * product
    assert count(lambda x: jax.lax.fori_loop(0, 5, lambda _, y: y @ x, x)) == 5 * product
    branches = (lambda x: x, lambda x: x @ x)
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, *branches, x)) == product
    image = jnp.ones((1, 8, 8, 3))
    kernel = jnp.ones((3, 3, 3, 5))
    conv = lambda image: jax.lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert count_flops(jax.make_jaxpr(conv)(image)) == 2 * 8 * 8 * 5 * 3 * 3 * 3
