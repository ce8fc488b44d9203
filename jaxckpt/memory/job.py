"""A program that is traced and lowered, to be compiled in any thread.

    job = ...                               # in the thread that traces
    report = job.report(job.compile())      # `compile` may run in another thread

Tracing and lowering belong to one thread: JAX's contexts (`jax.enable_x64`, a mesh) hold for a
thread alone. The compiler needs none of them, so several programs are compiled at once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxckpt.compiled import cache
from jaxckpt.compiled.report import MemoryReport


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A program that is ready to be compiled.

    Attributes:
      compile: Compiles it; any thread may call it.
      report: Returns the report of what `compile` returned; for the thread that traces.
      lowered: The program; None if another process lowers it.
    """

    compile: Callable[[], Any]
    report: Callable[[Any], MemoryReport]
    lowered: Any = None

    def run(self) -> MemoryReport:
        """Returns the program's report."""
        return self.report(self.compile())

    def storing(self, name: str) -> "Job":
        """Returns the same job, which also keeps its report on disk under a name."""

        def stored(found: Any) -> MemoryReport:
            report = self.report(found)
            cache.store(name, report)
            return report

        return dataclasses.replace(self, report=stored)
