"""`MemoryReport`: the memory that a compiled step needs, in bytes, with the source of each number.

Reports are plain data. This module imports no JAX, so a report kept on disk is read at once.
`peak.py` makes reports.
"""

import dataclasses
from typing import Any

from jaxckpt.compiled.buffers import NOTHING_READ, Buffer, Understood
from jaxckpt.sources import shown
from jaxckpt.units import iec

_SHOWN_BUFFERS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Memory of one compiled function on one device; `print` shows it as a small table.

    Attributes:
      peak_bytes: Device memory at the worst moment. argument_bytes: Bytes of the inputs.
      output_bytes: Bytes of all outputs, also of outputs that reuse a donated input. alias_bytes:
      Bytes of outputs that reuse a donated input; the inputs and the outputs both count
        these bytes.
      temp_bytes: Bytes of temporaries: residuals, gradients, working memory.
      host_bytes: Host memory that the step uses for offloaded values.
      code_bytes: Bytes of the compiled program.
      flops: FLOPs of one call's matrix products, with all trips of loops; None if unknown.
      target: The chip that the function is compiled for.
      source: The backend and the rule that the figures come from.
      jax_version: The version of JAX that compiled the function.
      usable_bytes: The bytes that a program may fill of a device; None if unknown.
      buffers: The largest buffers at the peak, largest first, as the compiler wrote them down.
      compile_seconds: How long the compiler took; None if it was not timed. Not compared.
      estimated_seconds: Seconds of one call by the chip's roofline; None if not asked for.
      recomputed_flops: FLOPs of recomputed matrix products; None if not asked for.
      findings: Parts of the plan that have no effect, a line each.
      num_devices: The number of devices that run the step together. Bytes are per device, FLOPs are
        of all devices.
      collective_bytes: Bytes that one device sends in one call; None on one device.
      collective_seconds: Seconds that the links need for the sent bytes; the estimated seconds have
        them too. None if the links are unknown.
      understood: The lines of the compiler's texts that were understood, out of all lines. Buffers
        and collectives are read from these texts. Not compared.
    """

    peak_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    host_bytes: int
    code_bytes: int
    flops: int | None
    target: str
    source: str
    jax_version: str
    usable_bytes: int | None = None
    buffers: tuple[Buffer, ...] = ()
    compile_seconds: float | None = dataclasses.field(default=None, compare=False)
    estimated_seconds: float | None = None
    recomputed_flops: int | None = None
    findings: tuple[str, ...] = ()
    num_devices: int = 1
    collective_bytes: int | None = None
    collective_seconds: float | None = None
    understood: Understood = dataclasses.field(default=NOTHING_READ, compare=False)

    @property
    def headroom_bytes(self) -> int | None:
        """The bytes that the peak leaves free, negative if it does not fit; None if unknown."""
        return None if self.usable_bytes is None else self.usable_bytes - self.peak_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the step fits the device; None if `usable_bytes` is unknown."""
        return None if self.headroom_bytes is None else self.headroom_bytes >= 0

    @property
    def recomputed_share(self) -> float | None:
        """Recomputed FLOPs, as a share of the FLOPs without remat; None if unknown."""
        again, flops = self.recomputed_flops, self.flops
        return None if again is None or flops is None else again / (flops - again)

    def as_json(self) -> dict[str, Any]:
        """Returns the report as JSON values, from which `from_json` makes an equal one."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "MemoryReport":
        """Returns the report of the values that `as_json` returned.

        Raises:
          KeyError, TypeError: The values are of something else.
        """
        buffers = tuple(Buffer(**one) for one in values["buffers"])
        made: dict[str, Any] = {"buffers": buffers, "findings": tuple(values["findings"])}
        made["understood"] = Understood(**values["understood"])
        return cls(**(values | made))

    def __str__(self) -> str:
        lines = [f"memory of one step on {self.target} ({self.source}, jax {self.jax_version})"]
        lines += [f"  {name:<12}{text:>12}  {note}".rstrip() for name, text, note in self._rows()]
        lines += self._buffer_lines()
        lines += [] if self.understood.is_all else [f"  {self.understood}"]
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, str, str]]:
        donated = f"{iec(self.alias_bytes)} in donated arguments" if self.alias_bytes else ""
        rows = [
            ("peak", iec(self.peak_bytes), "on the device at the worst moment"),
            ("arguments", iec(self.argument_bytes), ""),
            ("outputs", iec(self.output_bytes), donated),
            ("temporaries", iec(self.temp_bytes), "residuals, gradients, working memory"),
        ]
        rows += [("host", iec(self.host_bytes), "offloaded values")] if self.host_bytes else []
        rows += [("code", iec(self.code_bytes), "")] if self.code_bytes else []
        left = self.headroom_bytes
        if self.usable_bytes is not None and left is not None:
            note = f"{iec(left)} left" if left >= 0 else f"{iec(-left)} too little"
            rows.append(("usable", iec(self.usable_bytes), note))
        if self.flops is not None:
            rows.append(("matmul FLOPs", f"{self.flops:.3e}", ""))
        if share := self.recomputed_share:
            what = "of the FLOPs without remat, once more"
            rows.append(("recomputed", f"{100 * share:.1f} %", what))
        if self.estimated_seconds is not None:
            rows.append(("estimated", f"{1e3 * self.estimated_seconds:.1f} ms", "by the roofline"))
        if self.collective_bytes is not None:
            note = "sent by each device"
            if self.collective_seconds is not None:
                note += f", {1e3 * self.collective_seconds:.1f} ms of the estimate"
            rows.append(("collectives", iec(self.collective_bytes), note))
        if self.compile_seconds is not None:
            rows.append(("compiled in", f"{self.compile_seconds:.1f} s", ""))
        return rows

    def _buffer_lines(self) -> list[str]:
        largest = self.buffers[:_SHOWN_BUFFERS]
        lines = ["  largest buffers at the peak"] if largest else []
        for one in largest:
            path = one.operation.split("/")  # its last parts name the operation itself
            operation = "/".join(path if len(path) < 5 else ["...", *path[-3:]])
            parts = [f"{iec(one.size_bytes):>14}", one.shape, operation, shown(one.source)]
            lines.append("  " + "  ".join(part for part in parts if part))
        return lines
