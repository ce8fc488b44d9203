"""`measure` on this process's backend: the rules for each number, donation, abstract arguments."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

import jaxckpt
from jaxckpt.memory.built_step import BuiltStep
from jaxckpt.memory.measure import compile_step
from jaxckpt.memory.report import report_of

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
    assert report.usable_bytes is report.fits is None  # a CPU does not say
    assert report.compile_seconds > 0


def test_the_largest_buffers_are_named():
    report = jaxckpt.measure(lambda x, y: (x @ y).sum(), X, X)
    assert {"f32[256,256]"} == {one.shape for one in report.buffers if one.size_bytes == SIZE}
    assert {"x", "y"} <= {one.operation for one in report.buffers}


@pytest.fixture
def executables(tmp_path, monkeypatch):
    """JAX's cache of executables and ours of reports, both of this test alone."""
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path / "reports"))
    new = {"compilation_cache_dir": str(tmp_path), "persistent_cache_min_compile_time_secs": 0}
    old = {name: getattr(jax.config, f"jax_{name}") for name in new}

    def update(values):
        for name, value in values.items():
            jax.config.update(f"jax_{name}", value)
        compilation_cache.reset_cache()

    update(new)
    yield tmp_path
    update(old)


def test_an_executable_that_was_read_from_jaxs_cache_has_its_buffers(executables, monkeypatch):
    fn = lambda x: jnp.sin(x @ x).sum()
    first = jaxckpt.measure(fn, X)
    jax.clear_caches()
    assert jaxckpt.measure(fn, X).buffers == first.buffers != ()
    jax.clear_caches()
    monkeypatch.setenv("JAXCKPT_CACHE", str(executables / "elsewhere"))
    assert jaxckpt.measure(fn, X).buffers == ()  # it was read indeed


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


def test_unknown_targets_are_refused_before_anything_is_traced():
    def step(x):
        raise AssertionError("traced")

    with pytest.raises(ValueError, match=r"target 'v5f-1' is not known.*'v5e-1'"):
        jaxckpt.measure(step, X, target="v5f-1")


def test_a_loop_gets_the_executable_and_its_report():
    step = lambda x: x @ x
    compiled, report = compile_step(BuiltStep(fn=step, args=(X,), donate_argnums=0))
    measured = jaxckpt.measure(step, X, donate_argnums=0)
    assert report_of(compiled).peak_bytes == measured.peak_bytes
    assert report.peak_bytes == measured.peak_bytes and report.flops == measured.flops
    assert float(compiled(jnp.ones((256, 256)))[0, 0]) == 256


def test_text_is_a_small_table():
    text = str(jaxckpt.measure(lambda x: x @ x, X))
    assert text.splitlines()[0].startswith("memory of one step on local (XLA cpu")
    for name in ("peak", "arguments", "outputs", "temporaries", "host", "FLOPs", "buffers"):
        assert name in text
