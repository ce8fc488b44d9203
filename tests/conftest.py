"""What every test leaves as it found it, and which cases of slow tests the gate runs.

No test depends on how fast the machine is.
"""

import os

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

hypothesis.settings.register_profile(
    "any-speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any-speed")

_NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True, scope="module")
def same_cache_of_executables():
    """JAX's cache on disk, which a run in this process turns on for the rest of the process.

    A later test's program that is read from there leaves no texts of the compiler.
    """
    before = {name: getattr(jax.config, name) for name in _NAMES}
    yield
    if before != {name: getattr(jax.config, name) for name in _NAMES}:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


_LESS_OPTIMIZED = "jax_disable_most_optimizations"


def pytest_configure(config):
    """Compiles without most optimizations, in half of the time, also in a test's own processes.

    Peaks stay, and values up to rounding. This is for the quick tests and for the gate's slow ones;
    the gate's smoke set and the heavy tests compile with all optimizations.
    """
    if "slow" in config.option.markexpr:
        os.environ[_LESS_OPTIMIZED.upper()] = "1"
        jax.config.update(_LESS_OPTIMIZED, True)


@pytest.fixture
def optimized():
    """Compiles with all optimizations, for a test whose tolerance is that of optimized programs."""
    before = jax.config.values[_LESS_OPTIMIZED]
    jax.config.update(_LESS_OPTIMIZED, False)
    yield
    jax.config.update(_LESS_OPTIMIZED, before)


@pytest.hookimpl(tryfirst=True)  # before -m looks at marks
def pytest_collection_modifyitems(items):
    """Marks a slow test's cases `heavy`, except for the first case."""
    seen = set()
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("heavy"):
            test = item.nodeid.partition("[")[0]
            if test in seen:
                item.add_marker("heavy")
            seen.add(test)
