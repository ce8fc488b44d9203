"""Connections that processes keep to the first one, so that the end of one is known to all at once.

A process that dies takes its connections with it, whatever it was doing. The others wait for it in
some exchange of arrays, which no exception can end, so the thread that hears of it ends the
process, with one line.
"""

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping

# A process that ends for a reason of its own says so first, as all do that find the same error.
_GRACE_SECONDS = 5.0
_DONE = b"done\n"


class Lifelines:
    """Watches connections to other processes; a context manager.

    A context that is left by an exception lets go of the connections without a word: the others
    end as well.
    """

    def __init__(
        self, connections: Mapping[int, socket.socket], grace_seconds: float = _GRACE_SECONDS
    ):
        """Takes connections over.

        Args:
          connections: By the number of the process at the other end.
          grace_seconds: How long this process may still end by itself after another has ended.
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
        """Waits as long as it takes to hear that another process has ended, which ends this one."""
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
