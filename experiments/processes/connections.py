"""How processes find missing and dead processes: a roll call, then connections. No JAX import.

JAX's own start (`initialization_timeout`) ends a process whose peers are missing by a fatal error
of C++ that does not name them (exit code 1 on jax 0.7.2, SIGABRT on 0.10.2). It goes on if
processes disagree about their number. So the first process calls the roll at the same address
before JAX starts: every process sends its number and a digest of its run, and gets the result.

The connections of the roll call stay open. If a process dies, the system closes its connections,
and all other processes notice at once. They may be waiting for it in an exchange of arrays, which
no exception can end, so the thread that watches the connections ends its process with one line.
JAX's heartbeats notice a death too, later and with the fatal error. Only heartbeats notice a host
that vanishes without closing its connections.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from experiments.config import ConfigError
from experiments.processes.flags import ProcessFlags

_RETRY_SECONDS = 0.1
_GO = "go"


def call_roll(flags: ProcessFlags, digest: str) -> dict[int, socket.socket]:
    """Waits until all processes are present, with the same digest.

    Returns:
      Connections by the number of the process at the other end: process 0 has one to each other
      process, and each other process has one to process 0.

    Raises:
      ConfigError: A process did not come in time, two have the same number, or they disagree.
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
    """Waits for every other process, and sends all of them the result."""
    present: dict[int, socket.socket] = {}
    answer = None
    with _listener(flags) as listener:
        while answer is None and len(present) < flags.processes - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                gone = [number for number in range(1, flags.processes) if number not in present]
                answer = (
                    f"process{'es' * (len(gone) > 1)} {', '.join(map(str, gone))} of "
                    f"{flags.processes} {_not_come(flags)}"
                )
                break
            theirs = _read(connection)
            if theirs is not None:
                answer = _disagreement(word, theirs, present)
                if answer is None:
                    present[theirs["process"]] = connection
                    continue
                _tell(connection, answer)
            connection.close()  # of another program, or of a process that disagrees
    for connection in present.values():
        _tell(connection, answer or _GO)
    return answer or _GO, present


def _tell(connection: socket.socket, answer: str):
    with contextlib.suppress(OSError):  # a process that is gone is noticed later
        connection.sendall(answer.encode() + b"\n")


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
    options: dict[str, Any] = {"family": socket.AF_INET}
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
    """Sends this process's number and digest to the first process, and returns the answer."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(flags.address, timeout=left)
            connection.sendall(json.dumps(word).encode() + b"\n")
            # The first process may have begun to wait up to `join_seconds` later.
            connection.settimeout(left + flags.join_seconds)
            answer = _line(connection)
            if answer:
                return answer, {0: connection}
            connection.close()
        except OSError:  # the first process is not there yet, or has ended
            pass
        time.sleep(_RETRY_SECONDS)
    return f"process 0 of {flags.processes} {_not_come(flags)}", {}


def _not_come(flags: ProcessFlags) -> str:
    return f"did not come to {flags.coordinator} within {flags.join_seconds:g} s"


def _read(connection: socket.socket) -> dict | None:
    """Returns a process's number and digest; None if another program has connected."""
    connection.settimeout(5.0)
    try:
        found = json.loads(_line(connection))
        return found if {"process", "processes", "digest"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _line(connection: socket.socket) -> str:
    """Returns the text before the next newline, and reads no byte after it."""
    text = b""
    while not text.endswith(b"\n") and len(text) < 4096:
        one = connection.recv(1)
        if not one:
            break
        text += one
    return text.decode(errors="replace").strip()


# Time for a process to end by an error of its own, and to print it.
_GRACE_SECONDS = 5.0
_DONE = b"done\n"


class Lifelines:
    """Watches connections to other processes; a context manager.

    An exception that leaves the context closes the connections without the message `done`, which
    ends the other processes too.
    """

    def __init__(
        self, connections: Mapping[int, socket.socket], grace_seconds: float = _GRACE_SECONDS
    ):
        """Takes connections over, by the number of the process at the other end.

        After the end of another process, this one may end by itself for `grace_seconds`.
        """
        self._connections = connections
        self._grace_seconds = grace_seconds
        self._left = threading.Event()

    def __enter__(self):
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind, *_):
        self._left.set()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                if kind is None:
                    connection.sendall(_DONE)
                connection.shutdown(socket.SHUT_WR)

    def listen(self):
        """Waits until the end of another process would have ended this one."""
        time.sleep(self._grace_seconds + 1)

    def _watch(self):
        with selectors.DefaultSelector() as selector:
            for number, connection in self._connections.items():
                connection.settimeout(None)
                selector.register(connection, selectors.EVENT_READ, number)
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    connection = key.fileobj
                    assert isinstance(connection, socket.socket)  # as registered above
                    self._heard(connection, key.data)

    def _heard(self, connection: socket.socket, number: int):
        """Ends this process if another ended before its work was done."""
        try:
            word = connection.recv(len(_DONE))
        except OSError:
            word = b""
        if word == _DONE or self._left.is_set():
            return
        if self._left.wait(self._grace_seconds):
            return
        sys.stdout.flush()
        print(
            f"error: process {number} has ended; --resume goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
