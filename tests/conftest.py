"""What every test leaves as it found it."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

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
