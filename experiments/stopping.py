"""Stopping a run from outside: the first SIGTERM or Ctrl-C is a request, the second is not."""

import os
import signal


class StopRequest:
    """A context in which SIGTERM and SIGINT set `signal_name` once and end the process twice.

    Attributes:
      signal_name: None until a signal came, then its name.
    """

    def __init__(self):
        self.signal_name: str | None = None

    def __enter__(self):
        self._before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, _):
        if self.signal_name is not None:
            os._exit(128 + number)
        self.signal_name = signal.Signals(number).name
