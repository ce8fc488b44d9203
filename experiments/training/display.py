"""How a run looks while it runs: a live line on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """Shows steps as they are done; a context manager.

    Attributes:
      console: Where lines go; text printed through it stands above the live line.
    """

    def __init__(self, steps: int, console: Console | None = None, *, quiet: bool = False):
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._steps = steps
        self._started = time.perf_counter()
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=steps, metrics="")

    def __enter__(self):
        self._started = time.perf_counter()
        self._progress.start()
        return self

    def __exit__(self, *_):
        self._progress.stop()

    def print(self, text: str):
        """Prints a line that stays."""
        self.console.print(text, markup=False)

    def step(self, row: dict[str, Any], memory: str):
        """Shows a finished step.

        Args:
          row: As in metrics.jsonl: `step`, `loss`, `step_seconds`, `tokens_per_second`.
          memory: Predicted and actual memory as text.
        """
        text = (
            f"loss {row['loss']:.4f}  {1e3 * row['step_seconds']:.0f} ms  "
            f"{row['tokens_per_second']:,.0f} tokens/s  {_utilization(row)}{memory}"
        )
        self._progress.update(self._task, completed=row["step"], metrics=text)
        if not self.console.is_terminal:
            self._plain(row["step"], text)

    def _plain(self, step: int, text: str):
        """Prints the first step, the last, and every tenth part of the run."""
        if step not in (1, self._steps) and step % max(1, self._steps // 10):
            return
        left = (time.perf_counter() - self._started) / step * (self._steps - step)
        self.print(f"step {step}/{self._steps}  {text}  left {left:.0f} s")


def _utilization(row: dict[str, Any]) -> str:
    """Returns the shares of the chip's peak that a step reaches, where the peak is known."""
    return f"MFU {row['mfu']:.1%} HFU {row['hfu']:.1%}  " if "mfu" in row else ""
