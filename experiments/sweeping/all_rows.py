"""All rows of a sweep, one after another, under a progress bar; stopped and resumed at will."""

import contextlib
import shlex
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.provenance import commit
from experiments.record import RunError
from experiments.sweeping.case import Case
from experiments.sweeping.rows import Rows
from experiments.sweeping.running import run_case
from jaxckpt.memory.launch import Processes
from jaxckpt.memory.units import gib


def run_all(cases: Sequence[Case], folder: Path, *, command: str):
    """Runs the cases that the folder has no good row of.

    Raises:
      RunError: Rows failed, or the sweep was told to stop.
    """
    rows, console = Rows(folder), Console(highlight=False, soft_wrap=True)
    waiting = [case for case in cases if not rows.done(case.key)]
    if len(waiting) < len(cases):
        console.print(f"{len(cases) - len(waiting)} of {len(cases)} rows are done already")
    origin, failed = {"command": command, "commit": commit()}, 0
    processes, started = Processes(), time.perf_counter()
    with _stopping(processes) as stopped_by, _progress(console) as progress:
        task = progress.add_task("sweep", total=len(waiting), case="")
        for number, case in enumerate(waiting, start=1):
            progress.update(task, case=_text(case))
            row = run_case(case, folder, origin, processes)
            if stopped_by:
                done = f"stopped; {number - 1} rows more are done, the same command goes on"
                raise RunError(done, code=128 + stopped_by[0])
            rows.add(row)
            failed += "error" in row
            progress.update(task, advance=1)
            left = (time.perf_counter() - started) / number * (len(waiting) - number)
            tail = "" if console.is_terminal else f"  left {left:.0f} s"
            line = f"row {number}/{len(waiting)}  {_text(case)}  {_result(row)}{tail}"
            console.print(line, markup=False)
    report = shlex.join(["python", "-m", "experiments.report", str(folder), "-o", "report.html"])
    console.print(f"rows in {rows.path}; {report}", markup=False)
    if failed:
        raise RunError(
            f"{failed} of {len(cases)} rows failed, each with its error in {rows.path}; the same "
            "command tries them again"
        )


@contextlib.contextmanager
def _stopping(processes: Processes):
    """Yields a list that SIGINT and SIGTERM are added to; the first ends the row that runs."""
    stopped_by: list[int] = []

    def handle(number: int, _):
        stopped_by.append(number)
        # In a thread: the main one may hold the lock that `stop` takes.
        threading.Thread(target=processes.stop, daemon=True).start()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped_by
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("row {task.completed}/{task.total}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[case]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        disable=not console.is_terminal,
    )


def _text(case: Case) -> str:
    budget = f" within {case.config.budget}" if case.config.budget else ""
    return f"{case.config.remat}{budget}, {case.depth} blocks, {case.target}"


def _result(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"FAILED: {row['error']}"
    chosen = f"{row['plan']}  " if row["plan"] != row["asked"] else ""
    seconds = row["step_seconds"]
    took = "" if seconds is None else f"  {1e3 * seconds:.1f} ms {row['step_seconds_source']}"
    return f"{chosen}peak {gib(row['peak_bytes'])}{took}"
