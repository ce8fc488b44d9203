"""Several processes that train together: who they are, and a roll call before JAX is started.

    python -m experiments.train ... --coordinator host:1234 --processes 2 --process-id 0
    python -m experiments.train ... --coordinator host:1234 --processes 2 --process-id 1

JAX's own start waits for all processes, and where one never comes it ends the others without saying
which. So the first process calls the roll at the same address before: every process says who it is
and what it is about to run, and hears from the first whether all are there and agree. Nothing has
been written by then, nor has JAX been imported. The connections stay (`lifelines.py`).
"""

import atexit
import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Annotated

from cyclopts import Parameter

from experiments.cli import USER_ERRORS
from experiments.config import ConfigError, TrainConfig
from experiments.lifelines import Lifelines
from experiments.record import RunError

_RETRY_SECONDS = 0.1
_GO = "go"


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessFlags:
    """Which of several processes this one is; each may come from the environment.

    Attributes:
      coordinator: Address of the first process, host:port; it is reached from all others.
      processes: How many there are.
      process_id: This one's number, 0 for the first, which alone writes the record.
      join_seconds: How long to wait for the others.
    """

    coordinator: Annotated[str | None, Parameter(env_var="JAX_COORDINATOR_ADDRESS")] = None
    processes: Annotated[int, Parameter(env_var="JAX_NUM_PROCESSES")] = 1
    process_id: Annotated[int | None, Parameter(env_var="JAX_PROCESS_ID")] = None
    join_seconds: float = 300.0

    def __post_init__(self):
        if self.processes < 1:
            raise ConfigError(f"processes is {self.processes}; the least is 1")
        if not self.join_seconds > 0:
            raise ConfigError(f"join_seconds is {self.join_seconds}; it is above 0")
        if self.processes == 1:
            return
        if self.coordinator is None or self.process_id is None:
            raise ConfigError(
                f"{self.processes} processes need --coordinator host:port and --process-id, or "
                "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID in the environment"
            )
        if not 0 <= self.process_id < self.processes:
            raise ConfigError(
                f"process_id is {self.process_id}; of {self.processes} processes it is 0 to "
                f"{self.processes - 1}"
            )
        self.address  # noqa: B018  raises where it is none

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"coordinator {self.coordinator!r} is no host:port")
        return host.strip("[]"), int(port)

    def check(self, config: TrainConfig):
        """Raises for settings that several processes cannot share.

        Raises:
          ConfigError: Naming the flag.
        """
        if self.processes == 1:
            return
        if config.mesh is None:
            raise ConfigError(
                f"{self.processes} processes share one --mesh, such as data={self.processes}"
            )
        if config.out is None:
            raise ConfigError("several processes need --out, one folder that all of them see")
        if config.sample:
            raise ConfigError("--sample is for one process; leave it out")


@contextlib.contextmanager
def joined(flags: ProcessFlags, config: TrainConfig, corpus_sha256: str):
    """A context in which all processes are there and JAX's distributed system is up.

    Of one process it is any context.

    Raises:
      ConfigError: Some do not come, or not all run the same.
    """
    if flags.processes == 1:
        yield
        return
    told = {**config.to_dict(), "corpus": corpus_sha256, "compile_cache": None}
    text = json.dumps(told, sort_keys=True, default=str)
    connections = call_roll(flags, hashlib.sha256(text.encode()).hexdigest())
    with Lifelines(connections) as lifelines:
        try:
            _start_jax(flags)
            yield
        except Exception as error:
            if not isinstance(error, (*USER_ERRORS, RunError)):
                # An exchange that broke, perhaps: then another process has ended, and that is said.
                lifelines.listen()
            # JAX would wait for the others before this process ends.
            atexit.register(_leave, 2 if isinstance(error, USER_ERRORS) else 1)
            raise


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


def call_roll(flags: ProcessFlags, digest: str) -> dict[int, socket.socket]:
    """Returns once all processes have said that they are there, with the same digest.

    Returns:
      Connections by the number of the process at the other end: the first one's to all others, and
      each other's to the first.

    Raises:
      ConfigError: Some did not come in time, two have one number, or they do not agree.
    """
    word = {"process": flags.process_id, "processes": flags.processes, "digest": digest}
    deadline = time.monotonic() + flags.join_seconds
    run = _lead if flags.process_id == 0 else _follow
    answer, connections = run(flags, word, deadline)
    if answer != _GO:
        for connection in connections.values():
            connection.close()
        raise ConfigError(answer)
    return connections


def _lead(flags: ProcessFlags, word: dict, deadline: float) -> tuple[str, dict[int, socket.socket]]:
    """Hears every other process and tells all of them what came of it."""
    present: dict[int, socket.socket] = {}
    answer = None
    with _listener(flags) as listener:
        while answer is None and len(present) < flags.processes - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                answer = _missing(flags, present)
                break
            theirs = _read(connection)
            if theirs is None:  # whoever that was
                connection.close()
                continue
            answer = _disagreement(word, theirs, present)
            if answer is not None:
                _tell(connection, answer)
                connection.close()
            else:
                present[theirs["process"]] = connection
    answer = answer or _GO
    for connection in present.values():
        _tell(connection, answer)
    return answer, present


def _tell(connection: socket.socket, answer: str):
    with contextlib.suppress(OSError):  # who is gone is found out later
        connection.sendall(answer.encode() + b"\n")


def _missing(flags: ProcessFlags, present) -> str:
    gone = [number for number in range(1, flags.processes) if number not in present]
    noun = "process" if len(gone) == 1 else "processes"
    return (
        f"{noun} {', '.join(map(str, gone))} of {flags.processes} did not come to "
        f"{flags.coordinator} within {flags.join_seconds:g} s"
    )


def _disagreement(mine: dict, theirs: dict, present) -> str | None:
    number = theirs["process"]
    if theirs["processes"] != mine["processes"]:
        return (
            f"process {number} was started as one of {theirs['processes']}, process 0 as one of "
            f"{mine['processes']}"
        )
    if number == 0 or number in present:
        return f"two processes were started with --process-id {number}"
    if theirs["digest"] != mine["digest"]:
        return f"process {number} was started with other settings or data than process 0"
    return None


def _listener(flags: ProcessFlags) -> socket.socket:
    _, port = flags.address
    options = {"family": socket.AF_INET}
    if socket.has_dualstack_ipv6():
        options = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    try:
        return socket.create_server(("", port), **options)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"process 0 cannot listen on port {port}: {reason}") from None


def _follow(
    flags: ProcessFlags, word: dict, deadline: float
) -> tuple[str, dict[int, socket.socket]]:
    """Tells the first process who this is, and returns what it answers."""
    for left in _until(deadline):
        try:
            connection = socket.create_connection(flags.address, timeout=left)
            connection.sendall(json.dumps(word).encode() + b"\n")
            # The first process may have begun to wait later, by as much as this one waits.
            connection.settimeout(left + flags.join_seconds)
            answer = _line(connection)
            if answer:
                return answer, {0: connection}
            connection.close()
        except OSError:  # not there yet, or gone again
            pass
        time.sleep(_RETRY_SECONDS)
    gone = (
        f"process 0 of {flags.processes} did not come to {flags.coordinator} within "
        f"{flags.join_seconds:g} s"
    )
    return gone, {}


def _until(deadline: float) -> Iterator[float]:
    """Yields the seconds that are left, as long as there are any."""
    while (left := deadline - time.monotonic()) > 0:
        yield left


def _read(connection: socket.socket) -> dict | None:
    """Returns what a process says of itself; None from who is none."""
    connection.settimeout(5.0)
    try:
        found = json.loads(_line(connection))
        return found if {"process", "processes", "digest"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _line(connection: socket.socket) -> str:
    """Returns what comes before the next newline, and reads nothing of what comes after it."""
    text = b""
    while not text.endswith(b"\n") and len(text) < 4096:
        one = connection.recv(1)
        if not one:
            break
        text += one
    return text.decode(errors="replace").strip()


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    import jax

    return jax.process_index() == 0


def any_of_us(flag: bool) -> bool:
    """Returns whether the flag is set in any process; all of them have to ask."""
    import jax

    if jax.process_count() == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
