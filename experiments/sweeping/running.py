"""Running a sweep's cases, one after another, under a progress bar; stopped and resumed at will.

The rows are in `rows.jsonl`, one JSON object a line; a row is on disk before the next one runs.

A row on `local` is a short run of `experiments.train`. The plan `auto` is first chosen in another
process, so that the row measures its own memory. A row for an absent chip is compiled by the code
of `experiments.fit`, and has no losses.
"""

import contextlib
import dataclasses
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments import files
from experiments.config import RunError
from experiments.files import commit, is_locked, reason, versions, write_whole
from experiments.sweeping.case import LOCAL, Case, about, flags_of, settings_of
from experiments.training.record import METRICS
from jaxckpt.absent.launch import Processes
from jaxckpt.units import iec

ROWS = "rows.jsonl"
# The first step is slower: the runtime sets itself up.
_WARM_UP = 1
_LEAST_TIMES = 4  # fewer times have no quartiles
# Kept of a failed process's output: enough for a whole traceback of JAX.
_KEPT_LETTERS = 20_000
_RETRY_SECONDS = 0.2
# The exit codes of a run that a signal has stopped, after it has saved.
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


class RowError(RuntimeError):
    """A row that failed: the reason in one line, and the process's output."""

    def __init__(self, line: str, traceback: str = ""):
        super().__init__(line)
        self.traceback = traceback


class Rows:
    """The rows of a sweep by key; a later row of a key replaces an earlier one.

    Attributes:
      path: The file.
    """

    def __init__(self, folder: Path):
        """Reads the rows of the folder, and removes a line that a killed sweep left incomplete.

        Raises:
          RunError: The folder cannot be read or written.
        """
        self.path = folder / ROWS
        self._rows: dict[str, dict[str, Any]] = {}
        try:
            if self.path.exists():
                self._rows = {str(row.get("key")): row for row in files.read(self.path)[0]}
                write_whole(self.path, "".join(map(_line, self._rows.values())))
        except OSError as error:
            raise RunError(f"cannot write to {folder}: {reason(error)}") from None

    def done(self, key: str) -> bool:
        """Whether there is a row with this key that did not fail."""
        return "error" not in self._rows.get(key, {"error": "missing"})

    def add(self, row: dict[str, Any]):
        """Appends a row; it is on disk when this returns. Raises `RunError` if it cannot be."""
        self._rows[row["key"]] = row
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {reason(error)}") from None


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def run_case(
    case: Case, folder: Path, origin: dict[str, Any], processes: Processes
) -> dict[str, Any]:
    """Returns the row of a case; a failed case has a row with an error.

    Args:
      case: What to run.
      folder: The sweep's folder; a row on `local` leaves its run there.
      origin: The sweep's command and commit, a part of every row.
      processes: The sweep's processes, which may end them.
    """
    started = time.perf_counter()
    row = {"key": case.key, "asked": case.config.remat, "plan": case.config.remat}
    row |= {"target": case.target, "depth": case.depth, "budget": case.config.budget}
    row |= {"versions": versions(), "platform": platform.platform(), **origin}
    row |= {"train_command": case.command(), "settings": settings_of(case.config)}
    row |= {"about": about(case.config), "date": time.strftime("%Y-%m-%d")}
    try:
        row |= _run_here(case, folder, processes) if case.target == LOCAL else _compile(case)
    except RowError as error:
        row |= {"error": " ".join(str(error).split()), "traceback": error.traceback}
    return row | {"seconds": round(time.perf_counter() - started, 3)}


def _run_here(case: Case, folder: Path, processes: Processes) -> dict[str, Any]:
    chosen = {}
    if case.config.is_auto:
        with tempfile.TemporaryDirectory(prefix="jaxckpt-") as scratch:
            answer = Path(scratch) / "rows.json"
            flags = [*flags_of(case.config, "fit"), f"--json={answer}"]
            _run_module("experiments.fit", flags, processes)
            plan = json.loads(answer.read_text())["rows"][0]["plan"]
        config = dataclasses.replace(case.config, remat=plan, budget=None, calibrate=False)
        case = dataclasses.replace(case, config=config)
        chosen = {"plan": plan, "train_command": case.command()}
    out = folder / case.name
    with tempfile.TemporaryDirectory(prefix="jaxckpt-") as cache:
        flags = [*case.training_flags(Path(cache)), f"--out={out}", "--overwrite"]
        # A killed sweep may have left its run behind, which still writes to the folder.
        while is_locked(out) and not processes.stopped:
            time.sleep(_RETRY_SECONDS)
        _run_module("experiments.train", flags, processes)
    record, _ = files.read(out / METRICS)
    return chosen | row_of_run(record) | {"run": out.name}


def row_of_run(record: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the row of a run from the lines of its `metrics.jsonl`.

    Raises:
      KeyError, IndexError: There is no step in it, or it is not a record.
    """
    header = [row for row in record if "versions" in row][-1]
    rows = {row["step"]: row for row in record if "loss" in row}  # a run may repeat steps
    steps = [rows[step] for step in sorted(rows)]
    times = [row["step_seconds"] for row in steps]
    return {
        "device": header["device"],
        "backend": header["backend"],
        "peak_bytes": header["predicted_peak_bytes"],
        "temp_bytes": header["predicted_temp_bytes"],
        "runtime_peak_bytes": max(row.get("peak_bytes_in_use", 0) for row in steps) or None,
        "step_seconds": statistics.median(times[_WARM_UP:] or times),
        "step_seconds_spread": _middle_half(times[_WARM_UP:]),
        "step_seconds_source": "measured",
        "losses": [row["loss"] for row in steps],
        "flops": header["step_flops"],
        "recomputed_flops": header["recomputed_flops"],
        "compile_seconds": header["compile_seconds"],
        "memory_source": header["memory_source"],
        "buffers": header.get("buffers", []),
        "understood": header.get("understood", {}),
    }


def _middle_half(times: Sequence[float]) -> list[float] | None:
    """Returns the quartiles, between which half of the times lie; None for too few times."""
    if len(times) < _LEAST_TIMES:
        return None
    low, _, high = statistics.quantiles(times, method="inclusive")
    return [low, high]


def _compile(case: Case) -> dict[str, Any]:
    from experiments.fitting.measuring import measure_all

    (row,) = measure_all([(case.config, case.target)], parallel=1)
    if row.error is not None:
        raise RowError(row.error, row.traceback)
    report = row.measured
    found = {"plan": row.config.remat, "device": f"{case.target} (not present)"}
    if row.auto is not None:
        chosen = dataclasses.replace(case.config, remat=row.config.remat, budget=None)
        found["train_command"] = dataclasses.replace(case, config=chosen).command()
    values, names = report.as_json(), ("peak_bytes", "temp_bytes", "usable_bytes", "host_bytes")
    names += ("flops", "recomputed_flops", "compile_seconds", "buffers", "understood")
    return found | {
        "backend": "absent",
        "runtime_peak_bytes": None,
        "step_seconds": report.estimated_seconds,
        "step_seconds_spread": None,
        "step_seconds_source": "roofline",
        "losses": [],
        "memory_source": report.source,
        **{name: values[name] for name in names},
    }


def _run_module(module: str, flags: list[str], processes: Processes):
    """Runs a command of this package; raises `RowError` with its last line if it fails."""
    path = os.pathsep.join(filter(None, [str(files.ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+") as said:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": said}
        command = [sys.executable, "-m", module, *flags]
        code = processes.run(command, env={**os.environ, "PYTHONPATH": path}, **streams)
        if code:
            said.seek(0)
            text = said.read()
            raise RowError(_reason(code, text), text[-_KEPT_LETTERS:])


def _reason(code: int, text: str) -> str:
    if code < 0 or code in _STOPPED:
        name = signal.Signals(abs(code) % 128).name
        memory = ", which is what a machine without memory left does" * (name == "SIGKILL")
        return f"its process was ended by {name}{memory}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("error: ")]
    last = (ours or lines or [f"exit code {code}"])[-1]
    return last.removeprefix("error: ")


def run_all(cases: Sequence[Case], folder: Path, *, command: str):
    """Runs the cases for which the folder has no successful row.

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
    """Yields a list of the SIGINTs and SIGTERMs that came; the first ends the row that runs."""
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
    return f"{chosen}peak {iec(row['peak_bytes'])}{took}"
