"""`experiments.train`, and at its end how many programs JAX read from its cache of compiled ones.

`python -m tests.experiments.counted FLAG ...`; every program is kept, however fast it compiled.
"""

import runpy
import sys

import jax

_THRESHOLD = "jax_persistent_cache_min_compile_time_secs"


def main():
    """Runs the command."""
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    update = jax.config.update
    jax.config.update = lambda name, value: update(name, 0.0 if name == _THRESHOLD else value)
    runpy.run_module("experiments.train", run_name="__main__")
    print("read from the cache:", sum(event.endswith("/cache_hits") for event in hits))


if __name__ == "__main__":
    sys.argv[0] = "experiments.train"
    main()
