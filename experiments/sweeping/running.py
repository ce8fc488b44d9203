"""Running one case: a training run in a process of its own, or a compilation for an absent chip.

A row on `local` is a short run of `experiments.train`, so whatever a run can do, a row can; a plan
that the planner is to choose is chosen in another process before, so that the row's memory is its
own. A row for an absent chip is compiled as `experiments.fit` does it, and has no losses.
"""

import dataclasses
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import json_lines
from experiments.files import is_locked
from experiments.record import METRICS, versions
from experiments.sweeping.case import LOCAL, Case, flags_of
from jaxckpt.memory.launch import Processes

_ROOT = Path(__file__).parents[2]
# The first step waits for what the runtime sets up once.
_WARM_UP = 1
# Of what a failed process wrote: a traceback of JAX's, whole.
_KEPT_LETTERS = 20_000
_RETRY_SECONDS = 0.2
# What a run's process answers to a signal, once it has saved.
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


class RowError(RuntimeError):
    """A row that came to nothing: why, in one line, and all that is known of it."""

    def __init__(self, line: str, traceback: str = ""):
        super().__init__(line)
        self.traceback = traceback


def run_case(
    case: Case, folder: Path, origin: dict[str, Any], processes: Processes
) -> dict[str, Any]:
    """Returns the row of a case, also where it fails.

    Args:
      case: What to run.
      folder: Of the sweep; a row on `local` leaves its run there.
      origin: What every row says of the sweep: its command and commit.
      processes: Those of the sweep, which may end them.
    """
    started = time.perf_counter()
    row = {"key": case.key, "asked": case.config.remat, "plan": case.config.remat}
    row |= {"target": case.target, "depth": case.depth, "budget": case.config.budget}
    row |= {"versions": versions(), "platform": platform.platform(), **origin}
    row |= {"train_command": case.command(), "settings": case.settings()}
    try:
        row |= _run_here(case, folder, processes) if case.target == LOCAL else _compile(case)
    except RowError as error:
        row |= {"error": " ".join(str(error).split()), "traceback": error.traceback}
    return row | {"seconds": round(time.perf_counter() - started, 3)}


def _run_here(case: Case, folder: Path, processes: Processes) -> dict[str, Any]:
    chosen = {}
    if case.config.is_auto:
        plan = _chosen_here(case, processes)
        config = dataclasses.replace(case.config, remat=plan, budget=None, calibrate=False)
        case = dataclasses.replace(case, config=config)
        chosen = {"plan": plan, "train_command": case.command()}
    out = folder / case.name
    with tempfile.TemporaryDirectory(prefix="jaxckpt-") as cache:
        flags = [*case.training_flags(Path(cache)), f"--out={out}", "--overwrite"]
        # A sweep that was killed may have left the run that it was waiting for.
        while is_locked(out) and not processes.stopped:
            time.sleep(_RETRY_SECONDS)
        _run_module("experiments.train", flags, processes)
    return chosen | row_of_run(json_lines.read(out / METRICS).rows) | {"run": out.name}


def _chosen_here(case: Case, processes: Processes) -> str:
    with tempfile.TemporaryDirectory(prefix="jaxckpt-") as scratch:
        answer = Path(scratch) / "rows.json"
        flags = [*flags_of(case.config), "--plan=auto", f"--json={answer}"]
        _run_module("experiments.fit", flags, processes)
        return json.loads(answer.read_text())["rows"][0]["plan"]


def row_of_run(record: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns what the record of a run says, as a row does.

    Args:
      record: The lines of its `metrics.jsonl`: objects that begin or go on with a run, and steps.

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
        "step_seconds_source": "measured",
        "losses": [row["loss"] for row in steps],
        "flops": header["step_flops"],
        "recomputed_flops": header["recomputed_flops"],
        "compile_seconds": header["compile_seconds"],
        "memory_source": header["memory_source"],
        "buffers": header.get("buffers", []),
        "understood": header.get("understood", {}),
    }


def _compile(case: Case) -> dict[str, Any]:
    from experiments.measuring import measure_all

    (row,) = measure_all([(case.config, case.target)], parallel=1)
    if row.error is not None:
        raise RowError(row.error, row.traceback)
    report = row.measured
    found = {"plan": row.config.remat, "device": f"{case.target} (not present)"}
    if row.auto is not None:
        chosen = dataclasses.replace(case.config, remat=row.config.remat, budget=None)
        found["train_command"] = dataclasses.replace(case, config=chosen).command()
    return found | {
        "backend": "absent",
        "peak_bytes": report.peak_bytes,
        "temp_bytes": report.temp_bytes,
        "runtime_peak_bytes": None,
        "usable_bytes": report.usable_bytes,
        "host_bytes": report.host_bytes,
        "step_seconds": report.estimated_seconds,
        "step_seconds_source": "roofline",
        "losses": [],
        "flops": report.flops,
        "recomputed_flops": report.recomputed_flops,
        "compile_seconds": report.compile_seconds,
        "memory_source": report.source,
        "buffers": [dataclasses.asdict(one) for one in report.buffers],
        "understood": dataclasses.asdict(report.understood),
    }


def _run_module(module: str, flags: list[str], processes: Processes):
    """Runs a command of this package to its end.

    Raises:
      RowError: It failed; the last line that it said, and the text's end.
    """
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+") as said:
        code = processes.run(
            [sys.executable, "-m", module, *flags],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
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
