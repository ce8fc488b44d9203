"""The peak on each backend: a report made from what XLA says of a compiled program.

The same field means different things on different backends, so each has its rule:

- CPU and GPU: the peak is argument + output - alias + temp. CPU's own peak ignores temporaries.
- TPU: the peak is the size of main memory's buffer assignment, which libtpu dumps: it is what
  libtpu compares with what the chip has, and so it is exact for a program that it refuses too.
  `memory_analysis` is no such thing: its peak adds on-chip memory and values offloaded to the host
  to those on the device, and its `temp` may hold the arguments as well.
- TPU without a dump: its peak; if values are offloaded, argument + output - alias + temp.

On a TPU temporaries are what the peak leaves beside arguments and outputs. Host memory is apart
from all of these.

A step that libtpu refuses for its size still has a peak. libtpu raises RESOURCE_EXHAUSTED while it
compiles, with sizes in the text, and words it differently in each version. All wordings below are
real; `tests/compiled/oom_texts.json` keeps texts of libtpu 0.0.23, 0.0.42 and
0.0.50. The figures in a text are rounded, so where the compiler also left its buffer assignment
on disk (`buffers.read_totals`) that is what counts.
"""

import dataclasses
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxckpt.compiled.buffers import (
    NOTHING_READ,
    Totals,
    Understood,
    read_buffers,
    read_totals,
    read_understood,
)
from jaxckpt.compiled.collectives import Links, traffic
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.targets import present
from jaxckpt.targets.links import links_of
from jaxckpt.targets.target import LOCAL, Target
from jaxckpt.units import iec

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = r"([\d.]+)([BKMGT]?)"

# Wording -> whether its first figure is all that the program needs, or only a part of it. Its
# second figure is what the chip has for programs, or, where only one buffer is named, all it has.
_WORDINGS = {
    rf"memory required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)": True,
    rf"Ran out of memory in memory space hbm\. Used {_SIZE} of {_SIZE} hbm": True,
    rf"Allocation \(size={_SIZE}\) would exceed memory \(size={_SIZE}\).*space=hbm": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """What a refusal says.

    Attributes:
      needed_bytes: What the program needs, or at least needs.
      available_bytes: What the chip has for programs; None where the text does not say.
      is_total: Whether `needed_bytes` is all of it, or the one buffer that did not fit.
    """

    needed_bytes: int
    available_bytes: int | None
    is_total: bool

    def __str__(self) -> str:
        word = "needs" if self.is_total else "needs more than"
        return f"{word} {iec(self.needed_bytes)}"


def parse(text: str) -> OutOfMemory | None:
    """Returns what a compiler's error says of device memory, or None if it is another error.

    Running out of on-chip memory (vmem, smem) is another error: no plan of ours would help.
    """
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    for wording, is_total in _WORDINGS.items():
        found = re.search(wording, text, re.DOTALL)
        if found:
            return OutOfMemory(
                needed_bytes=_bytes(found[1], found[2]),
                available_bytes=_bytes(found[3], found[4]) if is_total else None,
                is_total=is_total,
            )
    return None


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


_ASSIGNED = "main memory's buffer assignment"


def compile_lowered(
    lowered,
    *,
    target: Target = LOCAL,
    flops: int,
    options: Mapping[str, int | str] | None = None,
) -> tuple[Any, MemoryReport]:
    """Compiles a lowered function, and reads what the compiler leaves beside the program.

    Args:
      lowered: What `jax.jit(f).lower(...)` returns, of arguments that lie on the target's devices.
      target: The chip, present or not.
      flops: Of one call.
      options: XLA's, by name.

    Returns:
      `(compiled, report)`. Where libtpu refuses a program for its size, `compiled` is None and the
      report says what it needs.
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
      compiled: What `jax.jit(f).lower(...).compile()` returns.
      target: The chip it was compiled for.
      backend: `"cpu"`, `"tpu"` or `"cuda"`; by default this process's.
      flops: FLOPs of one call, if they were counted.
      usable_bytes: What a program may fill of the chip; by default what this process's device says.
      compile_seconds: How long it took.
      dump: The folder it was compiled into with `xla_dump_to`.
      links: Between the devices, if they are known.

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
        totals = read_totals(dump) if dump is not None else None
        if totals is not None and totals.total_bytes >= outside:
            peak, rule = totals.total_bytes, _ASSIGNED
        elif not host and getattr(stats, "peak_memory_in_bytes", 0):
            peak, rule = stats.peak_memory_in_bytes, "compiler's peak"
    num_devices = _num_devices(compiled)
    sent = traffic(compiled.as_text(), num_devices) if num_devices > 1 else None
    understood = NOTHING_READ if dump is None else read_understood(dump)
    understood += NOTHING_READ if sent is None else sent.understood
    if rule != _ASSIGNED and totals is not None:  # a total that is less than its parts
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
        buffers=read_buffers(dump) if dump is not None else (),
        understood=understood,
        compile_seconds=compile_seconds,
        num_devices=num_devices,
        collective_bytes=None if sent is None else sent.bytes,
        collective_seconds=None if sent is None or links is None else sent.seconds(links),
    )


def _num_devices(compiled) -> int:
    shardings = jax.tree.leaves(compiled.input_shardings)
    return max((one.num_devices for one in shardings), default=1)


def refused(
    found: OutOfMemory,
    *,
    target: str,
    dump: Path,
    flops: int | None,
    usable_bytes: int,
    compile_seconds: float,
    num_devices: int,
) -> MemoryReport:
    """Returns the report of a program that libtpu refused for want of memory.

    Its exact figures are in the buffer assignment that libtpu dumps before it refuses; without
    one, the refusal's own figure is all there is. What it would send is not known.
    """
    totals = read_totals(dump)
    sizes = totals or Totals(
        total_bytes=found.needed_bytes, argument_bytes=0, output_bytes=0, alias_bytes=0
    )
    outside = sizes.argument_bytes + sizes.output_bytes - sizes.alias_bytes
    # A text that names a lesser limit than the table's is right: it is that libtpu's own.
    usable_bytes = min(usable_bytes, found.available_bytes or usable_bytes)
    return MemoryReport(
        # The total is never within what is usable, or the program would not have been refused.
        peak_bytes=max(sizes.total_bytes, usable_bytes + 1),
        argument_bytes=sizes.argument_bytes,
        output_bytes=sizes.output_bytes,
        alias_bytes=sizes.alias_bytes,
        temp_bytes=max(sizes.total_bytes - outside, 0),
        host_bytes=0,
        code_bytes=0,
        flops=flops,
        target=target,
        source=f"XLA tpu, refused, {_ASSIGNED if totals else 'its own words'}",
        jax_version=jax.__version__,
        usable_bytes=usable_bytes,
        buffers=read_buffers(dump),
        understood=read_understood(dump),
        compile_seconds=compile_seconds,
        num_devices=num_devices,
    )
