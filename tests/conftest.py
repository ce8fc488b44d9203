"""What every test leaves as it found it, and which cases of slow tests the gate runs.

No test depends on how fast the machine is.
"""

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


def pytest_configure(config):
    """Compiles quick tests without most optimizations, in half of the time.

    Peaks stay, and values up to rounding. Slow tests compare values more closely.
    """
    if "not slow" in config.option.markexpr:
        jax.config.update("jax_disable_most_optimizations", True)


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
