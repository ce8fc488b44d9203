"""Several processes that train together.

    python -m experiments.train ... --coordinator host:1234 --processes 2 --process-id 0
    python -m experiments.train ... --coordinator host:1234 --processes 2 --process-id 1

They call the roll (`connections.py`) before JAX is imported or anything is written. The connections
of the roll call stay open, so that all processes notice the end of one.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import sys
from typing import Any

from experiments.config import ConfigError, RunError, TrainConfig
from experiments.processes.connections import Lifelines, call_roll
from experiments.processes.flags import ProcessFlags
from jaxckpt.plans.errors import UserError


@contextlib.contextmanager
def joined(flags: ProcessFlags, config: TrainConfig, corpus_sha256: str):
    """A context in which all processes are present and JAX's distributed system is running.

    With one process it does nothing.

    Raises:
      ConfigError: A process does not come, or processes have different settings or data.
    """
    if flags.processes == 1:
        yield
        return
    told = {**dataclasses.asdict(config), "corpus": corpus_sha256, "compile_cache": None}
    text = json.dumps(told, sort_keys=True, default=str)
    connections = call_roll(flags, hashlib.sha256(text.encode()).hexdigest())
    with Lifelines(connections) as lifelines:
        try:
            _start_jax(flags)
            yield
        except BaseException as error:  # every exception is raised again
            alone = isinstance(error, RunError) and error.__cause__ is None
            if isinstance(error, Exception) and not (isinstance(error, UserError) or alone):
                # The cause may be that another process has ended; its message comes first then.
                lifelines.listen()
            # JAX would wait for the others before this process ends.
            atexit.register(_leave, _code_of(error))
            raise


def _code_of(error: BaseException) -> int:
    """Returns the exit code of a command that ends by an error; see `experiments.cli`."""
    if isinstance(error, Exception):
        return 2 if isinstance(error, UserError) else 1
    return 128 + (signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)


def _leave(code: int):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start_jax(flags: ProcessFlags):
    import jax

    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        *(flags.coordinator, flags.processes, flags.process_id),
        initialization_timeout=max(1, round(flags.join_seconds)),
    )
    if jax.process_count() != flags.processes:
        raise ConfigError(
            f"processes is {flags.processes}; the devices say that there are {jax.process_count()}"
        )


def is_first() -> bool:
    """Whether this process writes and prints."""
    import jax

    return jax.process_index() == 0


class SharedFlag:
    """A flag that any process can set. All processes ask in the same order, without waiting."""

    def __init__(self):
        self._asked: Any = False

    def anywhere(self, is_set_here: bool) -> bool:
        """Returns whether the flag is set in any process.

        With several processes the answer is that of the previous call, the same in all processes.
        The devices have it once the work that was dispatched before the previous call is done.
        """
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        if jax.process_count() == 1:
            return is_set_here
        devices = np.asarray(jax.devices())
        where = NamedSharding(Mesh(devices, "all"), PartitionSpec("all"))
        flag = np.array([is_set_here])
        flags = jax.make_array_from_callback(devices.shape, where, lambda _: flag)
        answer, self._asked = self._asked, jax.numpy.any(flags)  # on all devices, not waited for
        return bool(answer)
