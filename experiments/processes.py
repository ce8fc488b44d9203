"""Several processes that train together: who they are, and a roll call before JAX is started.

    python -m experiments.train ... --coordinator host:1234 --processes 2 --process-id 0
    python -m experiments.train ... --coordinator host:1234 --processes 2 --process-id 1

JAX's own start waits for all processes, and where one never comes it ends the others without saying
which. So the first process calls the roll at the same address before: every process says who it is
and what it is about to run, and hears from the first whether all are there and agree. Nothing has
been written by then, nor has JAX been imported.
"""

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

from experiments.config import ConfigError, TrainConfig

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


def join(flags: ProcessFlags, config: TrainConfig, corpus_sha256: str):
    """Waits for all processes, then starts JAX's distributed system; nothing if there is one.

    Raises:
      ConfigError: Some do not come, or not all run the same.
    """
    if flags.processes == 1:
        return
    told = {**config.to_dict(), "corpus": corpus_sha256, "compile_cache": None}
    text = json.dumps(told, sort_keys=True, default=str)
    call_roll(flags, hashlib.sha256(text.encode()).hexdigest())
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


def call_roll(flags: ProcessFlags, digest: str):
    """Returns once all processes have said that they are there, with the same digest.

    Raises:
      ConfigError: Some did not come in time, two have one number, or they do not agree.
    """
    word = {"process": flags.process_id, "processes": flags.processes, "digest": digest}
    deadline = time.monotonic() + flags.join_seconds
    answer = _lead(flags, word, deadline) if flags.process_id == 0 else _follow(flags, word, deadline)
    if answer != _GO:
        raise ConfigError(answer)


def _lead(flags: ProcessFlags, word: dict, deadline: float) -> str:
    """Hears every other process and tells all of them what came of it."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(flags))
        present: dict[int, socket.socket] = {0: None}
        lines = []
        answer = None
        while answer is None and len(present) < flags.processes:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                answer = _missing(flags, present)
                break
            stack.enter_context(connection)
            lines.append(connection)
            theirs = _read(connection)
            if theirs is None:  # whoever that was
                continue
            answer = _disagreement(word, theirs, present)
            present[theirs["process"]] = connection
        answer = answer or _GO
        for connection in lines:
            with contextlib.suppress(OSError):
                connection.sendall(answer.encode() + b"\n")
                connection.settimeout(1.0)
                connection.recv(1)  # the other end closes first, which leaves the port free
    return answer


def _missing(flags: ProcessFlags, present) -> str:
    gone = [number for number in range(flags.processes) if number not in present]
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
    if number in present:
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


def _follow(flags: ProcessFlags, word: dict, deadline: float) -> str:
    """Tells the first process who this is, and returns what it answers."""
    for left in _until(deadline):
        try:
            with socket.create_connection(flags.address, timeout=left) as connection:
                connection.sendall(json.dumps(word).encode() + b"\n")
                # The first process may have begun to wait later, by as much as this one waits.
                connection.settimeout(left + flags.join_seconds)
                with connection.makefile() as lines:
                    answer = lines.readline().strip()
                if answer:
                    return answer
        except OSError:  # not there yet, or gone again
            pass
        time.sleep(_RETRY_SECONDS)
    return (
        f"process 0 of {flags.processes} did not come to {flags.coordinator} within "
        f"{flags.join_seconds:g} s"
    )


def _until(deadline: float) -> Iterator[float]:
    """Yields the seconds that are left, as long as there are any."""
    while (left := deadline - time.monotonic()) > 0:
        yield left


def _read(connection: socket.socket) -> dict | None:
    """Returns what a process says of itself; None from who is none."""
    connection.settimeout(5.0)
    try:
        with connection.makefile() as lines:
            found = json.loads(lines.readline(4096))
        return found if {"process", "processes", "digest"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


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


def end_after(error: Exception):
    """Ends a process of several with one line: what it shares with the others is broken.

    Leaving in order would wait for them.
    """
    line = " ".join(str(error).split())
    line = line if len(line) <= 300 else f"{line[:297]}..."
    print(f"error: a process that this one works with is gone: {line}", file=sys.stderr, flush=True)
    os._exit(1)
