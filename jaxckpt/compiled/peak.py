"""The peak on each backend: makes a report from XLA's figures of a compiled program.

The same field means different things on different backends, so each has its rule:

- CPU and GPU: the peak is argument + output - alias + temp. CPU's own peak ignores temporaries.
- TPU: the peak is the size of main memory's buffer assignment, which libtpu dumps. libtpu compares
  this size with the chip's memory, so it is exact, even for a program that libtpu refuses.
  `memory_analysis` is not: its peak adds on-chip memory and offloaded values, and its `temp` may
  include the arguments.
- TPU without a dump: `memory_analysis`'s peak; if values are offloaded, argument + output - alias +
  temp.

On a TPU, temporaries are the peak without arguments and outputs. Host memory is counted apart.

A step that libtpu refuses for its size still has a peak. libtpu raises RESOURCE_EXHAUSTED while it
compiles, with sizes in the text, and words it differently in each version. All wordings below are
real; `tests/compiled/oom_texts.json` keeps texts of libtpu 0.0.23, 0.0.42 and 0.0.50. Figures in a
text are rounded, so a dumped buffer assignment (`buffers.read_totals`) is preferred.
"""

import dataclasses
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxckpt.compiled import buffers
from jaxckpt.compiled.buffers import NOTHING_READ, Understood, read_totals
from jaxckpt.compiled.collectives import Links, traffic
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.targets import present
from jaxckpt.targets.links import links_of
from jaxckpt.targets.target import LOCAL, Target

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = r"([\d.]+)([BKMGT]?)"

# Wording -> whether its first figure is the whole need of the program, or only one buffer. The
# second figure is the memory for programs; in a wording of one buffer, the chip's whole memory.
_WORDINGS = {
    rf"memory required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)": True,
    rf"Ran out of memory in memory space hbm\. Used {_SIZE} of {_SIZE} hbm": True,
    rf"Allocation \(size={_SIZE}\) would exceed memory \(size={_SIZE}\).*space=hbm": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """The sizes in a compiler's refusal.

    Attributes:
      needed_bytes: The bytes that the program needs, or at least needs.
      available_bytes: The bytes that the chip has for programs; None if the text does not say.
      is_total: Whether `needed_bytes` is of the whole program, or of the buffer that did not fit.
    """

    needed_bytes: int
    available_bytes: int | None
    is_total: bool


def parse(text: str) -> OutOfMemory | None:
    """Returns the sizes in an error that device memory is exhausted; None for another error.

    Exhausted on-chip memory (vmem, smem) is another error: no plan would help.
    """
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    nbytes = lambda number, unit: int(float(number) * _UNITS[unit])
    for wording, is_total in _WORDINGS.items():
        if found := re.search(wording, text, re.DOTALL):
            return OutOfMemory(
                needed_bytes=nbytes(found[1], found[2]),
                available_bytes=nbytes(found[3], found[4]) if is_total else None,
                is_total=is_total,
            )
    return None


_ASSIGNED = "main memory's buffer assignment"


def compile_lowered(
    lowered,
    *,
    target: Target = LOCAL,
    flops: int,
    options: Mapping[str, int | str] | None = None,
) -> tuple[Any, MemoryReport]:
    """Compiles a lowered function, and reads the files that the compiler dumps.

    Args:
      lowered: The result of `jax.jit(f).lower(...)`, with arguments on the target's devices.
      target: The chip, present or not.
      flops: The FLOPs of one call.
      options: XLA's options by name.

    Returns:
      `(compiled, report)`. If libtpu refuses a program for its size, `compiled` is None and the
      report says how much it needs.
    """
    chip = present.chip_of(target)
    about: dict[str, Any] = {"target": target.name, "flops": flops}
    about["usable_bytes"] = present.usable_bytes(target)
    with tempfile.TemporaryDirectory(prefix="jaxckpt-") as dump:
        started = time.perf_counter()
        seconds = lambda: time.perf_counter() - started
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": dump, **(options or {})})
        except jax.errors.JaxRuntimeError as error:
            found = parse(str(error)) if target.backend == "tpu" else None
            if found is None:
                raise
            about |= {"compile_seconds": seconds(), "dump": Path(dump)}
            return None, refused(found, num_devices=target.num_devices, **about)
        return compiled, report_of(
            compiled,
            backend=None if target.backend == "local" else target.backend,
            compile_seconds=seconds(),
            dump=Path(dump),
            links=None if chip is None else links_of(chip),
            **about,
        )


def report_of(
    compiled,
    *,
    target: str = "local",
    backend: str | None = None,
    flops: int | None = None,
    usable_bytes: int | None = None,
    compile_seconds: float | None = None,
    dump: Path | None = None,
    links: Links | None = None,
) -> MemoryReport:
    """Returns the report of a compiled function.

    Args:
      compiled: The result of `jax.jit(f).lower(...).compile()`.
      target: The name of the chip that it was compiled for.
      backend: `"cpu"`, `"tpu"` or `"cuda"`; by default this process's.
      flops: The FLOPs of one call; None if they were not counted.
      usable_bytes: The bytes that a program may fill of a device; by default this process's.
      compile_seconds: How long the compilation took; None if it was not timed.
      dump: The folder of its `xla_dump_to`; None if it dumped nothing.
      links: The links between the devices; None if they are unknown.

    Raises:
      RuntimeError: The backend has no memory analysis.
    """
    if usable_bytes is None and backend is None:
        usable_bytes = present.usable_bytes(LOCAL)
    backend = backend or jax.default_backend()
    stats = compiled.memory_analysis()
    if stats is None:
        raise RuntimeError(f"XLA's {backend} backend gives no memory analysis")
    host = (
        stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes
        + stats.host_temp_size_in_bytes
    )
    outside = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak, rule = outside + stats.temp_size_in_bytes, "argument + output - alias + temp"
    totals = None
    if backend == "tpu":
        totals = None if dump is None else read_totals(dump)
        if totals is not None and totals.total_bytes >= outside:
            peak, rule = totals.total_bytes, _ASSIGNED
        elif not host and getattr(stats, "peak_memory_in_bytes", 0):
            peak, rule = stats.peak_memory_in_bytes, "compiler's peak"
    shardings = jax.tree.leaves(compiled.input_shardings)
    num_devices = max((one.num_devices for one in shardings), default=1)
    sent = traffic(compiled.as_text(), num_devices) if num_devices > 1 else None
    understood = NOTHING_READ if dump is None else buffers.read_understood(dump)
    understood += NOTHING_READ if sent is None else sent.understood
    if rule != _ASSIGNED and totals is not None:  # the total was less than its parts
        understood += Understood(0, 1)
    return MemoryReport(
        peak_bytes=peak,
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temp_bytes=max(peak - outside, 0),
        host_bytes=host,
        code_bytes=stats.generated_code_size_in_bytes,
        flops=flops,
        target=target,
        source=f"XLA {backend}, {rule}",
        jax_version=jax.__version__,
        usable_bytes=usable_bytes,
        buffers=() if dump is None else buffers.read_buffers(dump),
        understood=understood,
        compile_seconds=compile_seconds,
        num_devices=num_devices,
        collective_bytes=None if sent is None else sent.bytes,
        collective_seconds=None if sent is None or links is None else sent.seconds(links),
    )


def refused(
    found: OutOfMemory, *, dump: Path, usable_bytes: int, target: str, **about: Any
) -> MemoryReport:
    """Returns the report of a program that libtpu refused for want of memory.

    Exact figures are in the buffer assignment that libtpu dumps before it refuses. Without a dump
    the refusal's own figure is taken. Its collectives are unknown.
    """
    totals = read_totals(dump)
    sizes = totals or buffers.Totals(total_bytes=found.needed_bytes)
    outside = sizes.argument_bytes + sizes.output_bytes - sizes.alias_bytes
    # If the text names a lower limit than the table, the text is right: it is libtpu's own limit.
    usable_bytes = min(usable_bytes, found.available_bytes or usable_bytes)
    return MemoryReport(
        # A refused program needs more than the usable bytes.
        peak_bytes=max(sizes.total_bytes, usable_bytes + 1),
        argument_bytes=sizes.argument_bytes,
        output_bytes=sizes.output_bytes,
        alias_bytes=sizes.alias_bytes,
        temp_bytes=max(sizes.total_bytes - outside, 0),
        host_bytes=0,
        code_bytes=0,
        target=target,
        source=f"XLA tpu, refused, {_ASSIGNED if totals else 'its own words'}",
        jax_version=jax.__version__,
        usable_bytes=usable_bytes,
        buffers=buffers.read_buffers(dump),
        understood=buffers.read_understood(dump),
        **about,
    )
