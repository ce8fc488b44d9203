"""The display of `experiments.fit`: every finished row, and the compilations that run.

A terminal has a live line for every row at work: the compilation and its seconds so far. The last
line counts the rows and says how much time is left. Elsewhere only finished rows are shown.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from experiments.fitting.row import FitRow


class Waiting:
    """A context manager; its methods may be called from any thread."""

    def __init__(self, count: int, parallel: int, console: Console | None = None):
        """Takes the number of rows, and how many are worked on at once."""
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._count, self._parallel, self._done = count, parallel, 0
        self._started = time.monotonic()
        self._now: dict[str, tuple[str, float]] = {}  # by row: what is compiled, and since when
        self._live = Live(
            get_renderable=self._lines,
            console=self._console,
            transient=True,
            refresh_per_second=4,
        )

    def __enter__(self):
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_):
        self._live.stop()

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[Callable[[str], None]]:
        """A context of a row at work; yields a function that takes the name of each compilation."""

        def compiling(what: str):
            label = f"compiling {name}: {what}" if what else f"compiling {name}"
            self._now[name] = label, time.monotonic()

        self._now[name] = f"{name} waits", time.monotonic()
        try:
            yield compiling
        finally:
            del self._now[name]

    def say(self, text: str):
        """Prints a line that stays."""
        self._console.print(text, markup=False)

    def done(self, row: FitRow):
        """Shows a finished row; a single row is shown only in the table."""
        self._done += 1
        if self._count > 1:
            self.say(f"{self._done}/{self._count}  {row.summary}")

    def _lines(self) -> Group:
        now = time.monotonic()
        lines = [f"{text}  {now - since:.0f} s" for text, since in [*self._now.values()]]
        if self._count > 1:
            lines.append(f"{self._done} of {self._count} rows are done{self._left(now)}")
        shown = [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]
        return Group(*(Spinner("dots", line) for line in shown[:1]), *shown[1:])

    def _left(self, now: float) -> str:
        """Returns the time left as text, from the rows that are done; empty before the first."""
        if not self._done:
            return ""
        left = (now - self._started) / self._done * (self._count - self._done)
        return f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left"
