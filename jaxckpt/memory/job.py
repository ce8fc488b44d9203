"""A traced and lowered program that any thread can compile.

    job = ...                               # in the thread that traces
    report = job.report(job.compile())      # `compile` may run in another thread

Tracing and lowering happen in one thread, because JAX's contexts (`jax.enable_x64`, a mesh) hold
for one thread only. The compiler does not need these contexts, so several programs are compiled at
once.
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
      compile: Compiles the program. Any thread may call this function.
      report: Returns the report, given the result of `compile`. Only the thread that traced the
        program may call this function.
      lowered: The program; None if another process lowers the program.
    """

    compile: Callable[[], Any]
    report: Callable[[Any], MemoryReport]
    lowered: Any = None

    def run(self) -> MemoryReport:
        """Returns the program's report."""
        return self.report(self.compile())

    def storing(self, name: str) -> "Job":
        """Returns a copy of the job that also keeps the report on disk under `name`."""

        def stored(found: Any) -> MemoryReport:
            report = self.report(found)
            cache.store(name, report)
            return report

        return dataclasses.replace(self, report=stored)
