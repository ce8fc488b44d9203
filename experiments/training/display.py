"""The display of a run: a live line on a terminal, plain lines elsewhere."""

import re
import shlex
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.status import Status
from rich.table import Table
from rich.text import Text

from experiments.training.record import CONFIG
from jaxckpt.units import iec

_GAP = 2  # columns between two parts of the live line
_WIDE = 100  # columns of a terminal that has room for a long bar


class Display:
    """Shows finished steps; a context manager.

    Attributes:
      console: The console; text that is printed through it stands above the live line.
      done: The last finished step.
    """

    def __init__(self, steps: int, console: Console | None = None, *, quiet: bool = False):
        self.console = console or Console(highlight=False, quiet=quiet)
        self._steps = steps
        self.done, self._parts = 0, ()
        self._first: tuple[int, float] | None = None  # the first step shown, and when that was
        self._live = Live(self, console=self.console, refresh_per_second=10)

    def __enter__(self):
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_):
        self.end_steps()

    def end_steps(self):
        """Leaves the live line as it is; later lines stand below it."""
        self._live.stop()

    def print(self, text: str, *, whole: bool = False):
        """Prints a line that stays; a terminal gets it wrapped between words.

        Args:
          text: The line. No word of it is cut, so a path or a plan can still be copied.
          whole: Whether to leave the line as it is, so that a command can be copied.
        """
        if self.console.is_terminal and not whole:
            text = "\n".join(wrapped(line, self.console.width) for line in text.splitlines())
        self.console.print(text, markup=False, soft_wrap=True)

    def waiting(self, text: str) -> Status:
        """Returns a context with a spinner on a terminal, and with nothing elsewhere."""
        return waiting(text, self.console)

    def step(self, row: dict[str, Any]):
        """Shows a finished step: a row of metrics.jsonl."""
        now = time.perf_counter()
        self._first = self._first or (row["step"], now)
        self._parts = (_left(row["step"], self._steps, self._first, now), *_metrics(row))
        self.done = row["step"]
        # Without a terminal: the first step, the last, and ten between them.
        is_shown = self.done in (1, self._steps) or self.done % max(1, self._steps // 10) == 0
        if not self.console.is_terminal and is_shown:
            self.print("  ".join([self._count(), *filter(None, self._parts)]))

    def _count(self) -> str:
        return f"step {self.done}/{self._steps}"

    def __rich_console__(self, console, options):
        """Yields the live line, with the first parts that fit the terminal.

        The most useful parts come first: step, bar, time left, loss, and so on.
        """
        count, parts = self._count(), [part for part in self._parts if part]
        bar = 20 if options.max_width >= _WIDE else 10
        room = options.max_width - len(count) - _GAP - bar
        shown = fitting(parts, room)
        line = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        for _ in range(2 + len(shown)):
            line.add_column(no_wrap=True)
        meter = ProgressBar(total=self._steps, completed=self.done, width=bar)
        line.add_row(Text(count), meter, *map(Text, shown))
        yield line


def waiting(text: str, console: Console | None = None) -> Status:
    """Returns a context in which a terminal shows a spinner beside a text; nothing elsewhere."""
    console = console or Console()
    return Status(text, console=console if console.is_terminal else Console(quiet=True))


def wrapped(line: str, width: int) -> str:
    """Returns a line broken between words; what follows stands below its text."""
    head = re.match(r" +|\S+ {2,}|", line)  # of a table's row, or a name before its text
    indent = " " * (head.end() if head else 0)
    return textwrap.fill(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def fitting(parts: Sequence[str], room: int) -> list[str]:
    """Returns the first parts that fit into `room` columns, each with a gap before it."""
    shown = []
    for part in parts:
        room -= _GAP + len(part)
        if room < 0:
            break
        shown.append(part)
    return shown


def _left(step: int, steps: int, first: tuple[int, float], now: float) -> str:
    """Returns the time left as text; empty after a single step."""
    done = step - first[0]
    if not done:
        return ""
    return f"{duration((now - first[1]) / done * (steps - step))} left"


def next_commands(folder: Path, steps: int, *, saved: bool) -> Iterator[str]:
    """Yields the commands that may follow a finished run, a line each.

    Args:
      folder: The run's folder.
      steps: The number of steps of the run.
      saved: Whether the folder holds a checkpoint.
    """
    run = shlex.quote(str(folder))
    yield f"next: python -m experiments.report {run} -o report.html"
    if saved:
        yield f"      python -m experiments.export {run} -o weights"
        again = f"--config={run}/{CONFIG} --out={run} --resume --steps={2 * steps}"
        yield f"      python -m experiments.train {again}"
    else:
        yield "      (--save-every=N keeps checkpoints, for --resume and experiments.export)"


def shown_path(path: Path) -> Path:
    """Returns a path as people type it: relative if it lies below the working folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def duration(seconds: float) -> str:
    """Returns seconds as people read them: `9 s`, `1:05 min`, `2:03:04 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"


def _metrics(row: dict[str, Any]) -> list[str]:
    """Returns what a step measured, the most useful first."""
    found = [f"loss {row['loss']:.4f}", f"{1e3 * row['step_seconds']:.0f} ms"]
    found.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in row:  # shares of the chip's peak that a step reaches
        found.append(f"MFU {row['mfu']:.1%} HFU {row['hfu']:.1%}")
    if "peak_bytes_in_use" in row:
        found.append(f"peak {iec(row['peak_bytes_in_use'])}")
    return found
