"""Compiling a step for an absent chip, in a fresh process for each step. No JAX import.

    step = Entry(function="experiments.training.step:abstract_step", arguments={"remat": "sqrt"})
    print(measure_entry(step, "v5e-1"))

A compiler for absent chips reads its environment when it is loaded, and a process can load only one
such compiler. So each job gets its own process with the right environment. This also works from a
notebook that has started JAX already, and several jobs run at once. Reports are kept on disk
(`cache.py`): an entry that was measured before takes milliseconds and does not load JAX.

Needed: libtpu for TPUs (`pip install 'jaxckpt[tpu]'`), JAX's CUDA plugin for NVIDIA GPUs
(`pip install 'jaxckpt[cuda13]'`). Neither a chip nor a driver is needed.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxckpt.absent import launch
from jaxckpt.compiled import cache
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.targets.target import Target, TargetError, parse_target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A function that builds a step in the process that compiles it.

    Attributes:
      function: `"package.module:function"`, importable in the process that compiles. The function
        returns `(fn, args, donate_argnums)`, or a `BuiltStep`, with abstract arguments. Arguments
        may have a `NamedSharding` over a `jax.sharding.AbstractMesh` of the target's size. Each
        device holds every argument without a sharding as a whole.
      arguments: The keyword arguments of the call, JSON values.

    Raises:
      ValueError: `function` has another form, or `arguments` are not JSON values.
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


class JobFailure(NamedTuple):
    """A failed job of `measure_many` with its error."""

    entry: Entry
    target: str
    error: Exception

    def __str__(self) -> str:
        return str(self.error)


def measure_entry(entry: Entry, target: str | Target) -> MemoryReport:
    """Returns the memory of the step that an entry builds, compiled for an absent target.

    The other process inherits settings of JAX and XLA from the environment. It does not inherit
    settings by `jax.config.update`.

    Args:
      entry: The function that builds the step.
      target: An absent chip.

    Returns:
      The memory report, in bytes per device.

    Raises:
      TargetError: The target is unknown, or it is `local`.
      Unavailable: The target's compiler is not installed.
      WorkerError: The entry or the compiler failed.
    """
    target = _absent(target)
    return _cached(entry_key(entry, target), target, {"entry": entry.as_json()})


def entry_key(entry: Entry, target: Target, **asked: Any) -> str:
    """Returns the name under which answers about an entry's step are kept on disk.

    Args:
      entry: The entry; the name depends on the sources of its package, too.
      target: The target.
      **asked: JSON values that the answer depends on.

    Raises:
      ValueError: The entry's package is not installed.
    """
    package = entry.function.partition(":")[0].split(".")[0]
    try:
        sources = cache.digest_of_sources({"jaxckpt", package})
    except ModuleNotFoundError as error:
        raise ValueError(f"entry {entry.function!r}: {error}") from None
    return _key(target, sources=sources, entry=entry.as_json(), **asked)


def _key(target: Target, **parts: Any) -> str:
    """Returns the name of a report that a target's process makes, for that process's settings."""
    return cache.key(environment=launch.environment(target), target=target.name, **parts)


def measure_program(
    program: bytes, *, target: str | Target, digest: str, **job: Any
) -> MemoryReport:
    """Returns the memory of an exported program, compiled for an absent target.

    Args:
      program: `Traveler.program`.
      target: An absent chip.
      digest: `Traveler.digest()`.
      **job: The fields `names`, `donated`, `placement` and `flops` of the `Traveler`.

    Returns:
      The memory report, in bytes per device.

    Raises:
      Unavailable: The target's compiler is not installed.
      WorkerError: The compiler failed.
    """
    target = _absent(target)
    sources = cache.digest_of_sources({"jaxckpt"})
    asked = {place: value for place, value in job.items() if place != "flops"}
    name = _key(target, sources=sources, program=digest, job=asked)
    report = _cached(name, target, {"entry": None, **job}, program=program)
    return dataclasses.replace(report, flops=job["flops"])  # FLOPs were counted in this process


def measure_many(
    jobs: Sequence[tuple[Entry, str | Target]],
    *,
    parallel: int = 2,
    progress: Callable[[int, MemoryReport | JobFailure], None] | None = None,
) -> list[MemoryReport | JobFailure]:
    """Measures several entries, each in a fresh process, some of them at once.

    Args:
      jobs: Pairs of an entry and a target.
      parallel: The number of processes at once. Each process takes a core, and a few GB for a model
        of 1e9 parameters.
      progress: Called with a job's place in `jobs` and its result when a job ends. The calls do
        not overlap.

    Returns:
      For each job, its report or a `JobFailure`. A failed job does not stop the other jobs.

    Raises:
      ValueError: `parallel` is less than 1.
    """
    return launch.in_parallel(_try, jobs, parallel, progress)


def _try(job: tuple[Entry, str | Target]) -> MemoryReport | JobFailure:
    entry, target = job
    try:
        return measure_entry(entry, target)
    except Exception as error:  # an error is the job's result and must not stop other jobs
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
