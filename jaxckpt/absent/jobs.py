"""Compiling for a chip that is not there, each time in a fresh process. No JAX import.

    step = Entry(function="experiments.training.step:abstract_step", arguments={"remat": "sqrt"})
    print(measure_entry(step, "v5e-1"))

The compilers of absent chips read their environment when they are loaded and are one to a process,
so a process is started for each job, with the right environment: it works from a notebook whose
JAX has started long ago, and several run at once. What is measured once is kept (`cache.py`); an
entry that was measured before costs milliseconds and loads no JAX at all.

Needed: libtpu for TPUs (`pip install 'jaxckpt[tpu]'`), JAX's CUDA plugin for NVIDIA GPUs
(`pip install 'jaxckpt[cuda13]'`); no chip, no driver.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxckpt.absent import launch
from jaxckpt.compiled import cache
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.targets.target import Target, TargetError, parse_target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A function that builds a step in the process that compiles it.

    Attributes:
      function: `"package.module:function"`, importable there; it returns
        `(fn, args, donate_argnums)`, or a `BuiltStep`, with abstract arguments. These may carry
        `NamedSharding`s over a `jax.sharding.AbstractMesh` as large as the target; else each device
        holds everything.
      arguments: Keyword arguments of it, JSON values.

    Raises:
      ValueError: The name is of another form, or the arguments are no JSON.
    """

    function: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        module, colon, name = self.function.partition(":")
        if not (module and colon and name) or module == "__main__":
            raise ValueError(
                f"entry {self.function!r} is no function that another process can import; "
                "valid: 'package.module:function'"
            )
        try:
            json.dumps(self.arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"arguments of entry {self.function!r}: {error}") from None

    def as_json(self) -> dict[str, Any]:
        """Returns the entry's fields as JSON values."""
        return {"function": self.function, "arguments": dict(self.arguments)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobFailure:
    """A job of `measure_many` that came to nothing, and the error that says why."""

    entry: Entry
    target: str
    error: Exception

    def __str__(self) -> str:
        return str(self.error)


def measure_entry(entry: Entry, target: str | Target) -> MemoryReport:
    """Returns the memory of the step that an entry builds, compiled for an absent target.

    Settings of JAX and XLA in the environment hold in the other process; those made by
    `jax.config.update` do not.

    Raises:
      TargetError: There is no such target, or it is `local`.
      Unavailable: The target's compiler is not installed.
      WorkerError: The entry or the compiler failed.
    """
    target = _absent(target)
    return _cached(entry_key(entry, target), target, {"entry": entry.as_json()})


def entry_key(entry: Entry, target: Target, **asked: Any) -> str:
    """Returns what is kept of an entry's step under: its sources decide, beside all else.

    Args:
      entry: The entry.
      target: An absent one.
      **asked: What else the answer depends on, JSON values.

    Raises:
      ValueError: The entry's package is not there.
    """
    package = entry.function.partition(":")[0].split(".")[0]
    try:
        sources = cache.digest_of_sources({"jaxckpt", package})
    except ModuleNotFoundError as error:
        raise ValueError(f"entry {entry.function!r}: {error}") from None
    return _key(target, sources=sources, entry=entry.as_json(), **asked)


def _key(target: Target, **parts: Any) -> str:
    """Returns the name of a report that a process for a target makes: its settings decide."""
    return cache.key(environment=launch.environment(target), target=target.name, **parts)


def measure_program(
    program: bytes, *, target: str | Target, digest: str, **job: Any
) -> MemoryReport:
    """Returns the memory of an exported program, compiled for an absent target.

    Args:
      program: `traveling.Traveler.program`.
      target: An absent one.
      digest: `traveling.Traveler.digest()`: what the report is kept under.
      **job: The traveler's other fields, as JSON values.

    Raises:
      Unavailable: The target's compiler is not installed.
      WorkerError: The compiler failed.
    """
    target = _absent(target)
    sources = cache.digest_of_sources({"jaxckpt"})
    asked = {place: value for place, value in job.items() if place != "flops"}
    name = _key(target, sources=sources, program=digest, job=asked)
    report = _cached(name, target, {"entry": None, **job}, program=program)
    return dataclasses.replace(report, flops=job["flops"])  # those were counted here


def measure_many(
    jobs: Sequence[tuple[Entry, str | Target]],
    *,
    parallel: int = 2,
    progress: Callable[[int, MemoryReport | JobFailure], None] | None = None,
) -> list[MemoryReport | JobFailure]:
    """Measures several entries, a fresh process for each, some at once.

    Args:
      jobs: Entries and targets.
      parallel: Processes at once; each takes a core and, for a model of 1e9 parameters, some GB.
      progress: Called with a job's place in `jobs` and its result as each ends, one at a time.

    Returns:
      For each job its report, or a `JobFailure`: one that fails does not stop the others.

    Raises:
      ValueError: `parallel` is less than 1.
    """
    return launch.in_parallel(_try, jobs, parallel, progress)


def _try(job: tuple[Entry, str | Target]) -> MemoryReport | JobFailure:
    entry, target = job
    try:
        return measure_entry(entry, target)
    except Exception as error:  # whatever it is, it is this job's result and no other's
        return JobFailure(entry=entry, target=str(target), error=error)


def _absent(target: str | Target) -> Target:
    target = parse_target(target)
    if target.backend == "local":
        raise TargetError("target 'local' is this process's own backend: jaxckpt.measure takes it")
    return target


def _cached(
    name: str, target: Target, job: Mapping[str, Any], *, program: bytes = b""
) -> MemoryReport:
    report = cache.load(name)
    if report is None:
        launch.check_available(target)
        report = launch.run({**job, "target": target.name}, program, target)
        cache.store(name, report)
    return report
