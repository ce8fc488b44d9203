"""Stopping a run: the first SIGTERM or Ctrl-C asks it to stop, the second ends the process."""

import os
import signal
import threading


class StopRequest:
    """A context in which the first SIGTERM or SIGINT sets `signal_name`, a second ends the process.

    Python runs signal handlers between bytecodes of the main thread, which may wait long for a
    step. So a thread reads the signals from the wake-up pipe, and the second signal acts at once.

    Attributes:
      signal_name: The name of the first signal; None before it.
    """

    def __init__(self):
        self.signal_name: str | None = None

    def __enter__(self):
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # The handlers do nothing, but without one a signal would not reach the pipe.
        self._before = {
            number: signal.signal(number, lambda *_: None)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        threading.Thread(target=self._watch, args=(tuple(self._before),), daemon=True).start()
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)

    def _watch(self, watched: tuple[int, ...]):
        while number := os.read(self._reader, 1):
            if number[0] not in watched:
                continue
            if self.signal_name is not None:
                os._exit(128 + number[0])
            self.signal_name = signal.Signals(number[0]).name
        os.close(self._reader)
