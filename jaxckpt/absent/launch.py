"""Starts the process that compiles for an absent chip (`memory/worker.py`). No JAX import.

The process inherits this process's import path and its environment, except for variables of the
target's compiler. Its output is caught, because libtpu writes banners to file descriptor 2 that a
user does not need. Its errors come back as results. If the process dies without a result, the error
shows the end of its output.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from jaxckpt.compatibility import install
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.plans.errors import UserError
from jaxckpt.targets.target import Target

_SHARED = {
    "JAX_PLATFORMS": "cpu",  # the process has no chip, so JAX must not look for a chip
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # programs for absent chips are never run
}
# Without these values libtpu would ask a Cloud machine's metadata server. Any valid accelerator
# type works, because the topology to compile for is given separately. libtpu locks the machine for
# one process that uses its chip, but a compiler does not use the chip.
_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_ENVIRONMENT = {"tpu": _TPU, "cuda": {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}}

# backend -> (modules of which one must be installed, the extra that installs one)
_NEEDED = {
    "tpu": (("libtpu",), "tpu"),
    "cuda": (("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "cuda13"),
}

PROGRESS = "progress.jsonl"  # a file in a job's folder: the progress, as lines of JSON
THREADS = "jaxckpt-compile"  # the beginning of the names of threads that compile
_WATCHED_SECONDS = 0.2
_ENDING_SECONDS = 1.0  # how long to wait for stopped processes to end
_BYTES_OF_ONE = 4 << 30  # memory that a compilation may take
_GROUP = Path("/sys/fs/cgroup")


class Unavailable(UserError, RuntimeError):
    """The compiler for a target is not installed: one line, with the command that installs it."""


class WorkerError(RuntimeError):
    """The process that compiles failed: one line, with the process's traceback as a note.

    Attributes:
      kind: The class of the error in the process; `"died"` if the process left no result.
      detail: The whole text of the error; the process's output if it left no result.
    """

    def __init__(self, message: str, *, kind: str, detail: str, traceback: str = ""):
        super().__init__(message)
        self.kind, self.detail = kind, detail
        if traceback:
            self.add_note(f"In the process that compiles:\n{traceback}")


class WorkerRefusal(UserError, WorkerError):
    """The process that compiles failed by an error that the user can correct."""


class Processes:
    """The processes of one caller, who can end all of them from another thread.

    Attributes:
      stopped: Whether the processes were ended. After that no process is started.
    """

    def __init__(self):
        self.stopped = False
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()

    def run(
        self, command: Sequence[str], *, watch: Callable[[], Any] = lambda: None, **options: Any
    ) -> int:
        """Runs a command to its end and returns its exit code, negative if a signal ended it.

        Args:
          command: The command and its arguments.
          watch: Called about every `_WATCHED_SECONDS` while the command runs.
          **options: Options of `subprocess.Popen`.
        """
        with self._lock:  # `stop` either sees this process or prevents its start
            if self.stopped:
                return -signal.SIGTERM
            process = subprocess.Popen(command, **options)
            self._running.add(process)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(_WATCHED_SECONDS)
                watch()
        finally:  # an interrupt of this thread ends the process too
            process.kill()
            process.wait()
            with self._lock:
                self._running.discard(process)

    def stop(self):
        """Ends all running processes and prevents new ones."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.kill()


# The processes that a thread of `in_parallel` starts; None in any other thread.
_PROCESSES: ContextVar[Processes | None] = ContextVar("processes", default=None)
Item = TypeVar("Item")
Answer = TypeVar("Answer")


def is_stopped() -> bool:
    """Whether this thread belongs to a call of `in_parallel` that was interrupted."""
    processes = _PROCESSES.get()
    return processes is not None and processes.stopped


def in_parallel(
    work: Callable[[Item], Answer],
    items: Iterable[Item],
    parallel: int,
    progress: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Returns the result of `work` for each item, in order; several calls run at once, in threads.

    Args:
      work: A function of one item. It may start processes (`run_module`). If this call is
        interrupted, these processes are ended.
      items: The items. This thread takes an item while threads work on earlier items.
      parallel: The number of threads at once.
      progress: Called in this thread with an item's place and result when an item is done.

    Returns:
      The results, in the order of the items.

    Raises:
      ValueError: `parallel` is less than 1.
    """
    with beside(work, items, parallel, progress) as futures:
        pass
    return [future.result() for future in futures]


@contextlib.contextmanager
def beside(
    work: Callable[[Item], Answer],
    items: Iterable[Item],
    parallel: int,
    progress: Callable[[int, Answer], None] | None = None,
) -> Iterator[list[Future[Answer]]]:
    """A context during which `work` of each item runs in threads; the end waits for all items.

    Args:
      work: As for `in_parallel`.
      items: As for `in_parallel`; all items are taken before the context begins.
      parallel: The number of threads at once.
      progress: Called in this thread at the context's end, with an item's place and result.

    Yields:
      The future of each item, in order.

    Raises:
      ValueError: `parallel` is less than 1.
    """
    if parallel < 1:
        raise ValueError(f"parallel is {parallel}; at least 1 process compiles")
    processes = Processes()
    places: dict[Future[Answer], int] = {}
    pool = ThreadPoolExecutor(parallel, THREADS, _PROCESSES.set, initargs=(processes,))
    try:
        for place, item in enumerate(items):
            places[pool.submit(work, item)] = place
        yield [*places]
        for future in as_completed(places):
            answer = future.result()
            if progress is not None:
                progress(places[future], answer)
    finally:  # after an interrupt, or an error of `progress`, no process may be left running
        pool.shutdown(wait=False, cancel_futures=True)
        processes.stop()
        wait(places, _ENDING_SECONDS)


def at_once() -> int:
    """Returns how many compilations fit this machine's free cores and memory, at least 1."""
    is_known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if is_known else os.cpu_count() or 1
    free = _free_bytes()
    return max(1, cores if free is None else min(cores, free // _BYTES_OF_ONE))


def _free_bytes() -> int | None:
    """Returns the free bytes of this machine or this process's control group; None if unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(next(int(row[1]) << 10 for row in rows if row[0] == "MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):  # "max" means no limit and is not a number
        most, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(max(most - used, 0))
    return min(found, default=None)


def check_available(target: Target):
    """Checks that the compiler for a target is installed.

    Raises:
      Unavailable: The compiler is not installed.
    """
    modules, extra = _NEEDED[target.backend]
    if any(_is_there(module) for module in modules) and _is_there("flatbuffers"):
        return
    raise Unavailable(f"target {target} needs a compiler that is not installed: {install(extra)}")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the module's parent is missing
        return False


def run(job: Mapping[str, Any], program: bytes, target: Target) -> MemoryReport:
    """Compiles a job in a fresh process and returns its report.

    Args:
      job: JSON values that `memory/worker.py` reads.
      program: An exported program; empty for a job with an entry.
      target: The absent target.

    Raises:
      WorkerError: The job failed, or the process died.
    """
    result = run_module("jaxckpt.memory.worker", job, program, target)
    return MemoryReport.from_json(result["report"])


def run_module(
    module: str,
    job: Mapping[str, Any],
    program: bytes,
    target: Target,
    progress: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """Runs a job in a fresh process with a target's environment, and returns its result as JSON.

    Args:
      module: The module to run. Its argument is a folder. The module reads `job.json` and
        `program.bin` in the folder and writes `result.json`, with the key `error` if it failed.
      job: The job, JSON values.
      program: The content of `program.bin`; may be empty.
      target: The absent target.
      progress: Called in this process with each line of `PROGRESS`, as JSON values.

    Returns:
      The content of `result.json`.

    Raises:
      WorkerError: The job failed, or the process died.
    """
    processes = _PROCESSES.get() or Processes()
    with tempfile.TemporaryDirectory(prefix="jaxckpt-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job))
        (folder / "program.bin").write_bytes(program)
        command = [sys.executable, "-P", "-m", module, name]
        streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        (folder / PROGRESS).touch()
        with (folder / "log").open("w") as log, (folder / PROGRESS).open() as lines:

            def watch():
                while progress is not None and (line := lines.readline()):
                    progress(json.loads(line))

            streams |= {"env": environment(target), "stdout": log}
            code = processes.run(command, watch=watch, **streams)
            watch()
        try:
            result = json.loads((folder / "result.json").read_text())
        except FileNotFoundError:
            raise _death(target, code, (folder / "log").read_text(errors="replace")) from None
    if "error" in result:
        found = result["error"]
        line = " ".join(found["detail"].split())
        line = line if len(line) <= 600 else f"{line[:600]}..."
        error = WorkerRefusal if found.pop("is_users") else WorkerError
        raise error(f"{target}: {found['kind']}: {line}", **found)
    return result


def environment(target: Target) -> dict[str, str]:
    """Returns the environment of a process that compiles for a target."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return os.environ | _SHARED | _ENVIRONMENT[target.backend] | {"PYTHONPATH": path}


def _death(target: Target, code: int, log: str) -> WorkerError:
    """Returns the error of a process that left no result."""
    how = f"exited with {code}"
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
        how += " (is this machine out of memory?)" if code == -signal.SIGKILL else ""
    lines = [line for line in log.splitlines() if line.strip()]
    last = f": {lines[-1][:300]}" if lines else ""
    return WorkerError(f"{target}: the process that compiles {how}{last}", kind="died", detail=log)
