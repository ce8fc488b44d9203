"""`MemoryReport`: what a compiled step needs, in bytes, with where each number comes from.

Reports are plain data: this module imports no JAX, so that one kept on disk is read at once.
`peak.py` makes them.
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
      peak_bytes: What the device needs at the worst moment.
      argument_bytes: Inputs.
      output_bytes: Outputs, those that reuse a donated input included.
      alias_bytes: Outputs that live in donated inputs, counted in both of the above.
      temp_bytes: Everything in between: residuals, gradients, working memory.
      host_bytes: Host memory that the step uses for offloaded values.
      code_bytes: The compiled program.
      flops: Matrix-product FLOPs of one call, loops counted by their trips; None if unknown.
      target: The chip it is compiled for.
      source: Who says so: backend and rule.
      jax_version: The JAX that compiled it.
      usable_bytes: What a program may fill of the device; None if unknown.
      buffers: The largest buffers at the peak, largest first, as the compiler wrote them down.
      compile_seconds: How long the compiler took, when it was asked; not compared.
      estimated_seconds: Of one call, by the roofline of the chip; None if it was not asked for.
      recomputed_flops: Those of `flops` that a plan runs again; None if it was not asked for.
      findings: What of the plan does nothing, a line each.
      num_devices: Devices that the step runs on together; bytes are of one of them, FLOPs of all.
      collective_bytes: What one device sends to others in one call; None on one device.
      collective_seconds: What its links need for that, part of `estimated_seconds`; None if they
        are not known.
      understood: How much of the compiler's texts was understood, which collectives and buffers
        are read from; not compared.
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
        """What is left of the device at the peak, negative if it does not fit; None if unknown."""
        return None if self.usable_bytes is None else self.usable_bytes - self.peak_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the step fits the device; None if what is usable is unknown."""
        return None if self.headroom_bytes is None else self.headroom_bytes >= 0

    def as_json(self) -> dict[str, Any]:
        """Returns the report as JSON values, from which `from_json` makes an equal one."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "MemoryReport":
        """Returns the report of `as_json`.

        Raises:
          KeyError, TypeError: The values are not those of a report.
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
        rows = [
            ("peak", iec(self.peak_bytes), "on the device at the worst moment"),
            ("arguments", iec(self.argument_bytes), ""),
            (
                "outputs",
                iec(self.output_bytes),
                f"{iec(self.alias_bytes)} in donated arguments" if self.alias_bytes else "",
            ),
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
        if self.recomputed_flops and self.flops is not None:
            share = 100 * self.recomputed_flops / (self.flops - self.recomputed_flops)
            rows.append(("recomputed", f"{share:.1f} %", "of the FLOPs without remat, once more"))
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
            parts = [
                f"{iec(one.size_bytes):>14}",
                one.shape,
                _short(one.operation),
                shown(one.source),
            ]
            lines.append("  " + "  ".join(part for part in parts if part))
        return lines


def _short(operation: str) -> str:
    """Returns the end of a JAX operation's path, which is where it says what it does."""
    parts = operation.split("/")
    return operation if len(parts) < 5 else "/".join(["...", *parts[-3:]])
