"""What a compiled program sends between devices: its collectives, as XLA's own text has them.

    sent = traffic(compiled.as_text(), num_devices=8)
    sent.bytes, sent.seconds(links)

The partitioner decides what is sent, so a jaxpr does not show it. The text does: every collective
with its shape and its groups, and the loops around it. Trips are the loop's bound; the executor's
loops have none in the program and say their mean in their name (`transforms.trips`).

Bytes are those that one device sends in a ring: a gather of n bytes over g devices sends
n (g - 1) / g, a reduction twice that (Thakur et al. 2005, Optimization of collective communication
operations in MPICH, section 4).
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from jaxckpt.memory.links import Links
from jaxckpt.memory.program_text import INSTRUCTION, Program, called, op_name
from jaxckpt.memory.replica_groups import first_group, says_group
from jaxckpt.memory.understood import Understood

_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]")
_CHANNEL, _CHAIN = re.compile(r"channel_id=([0-9]+)"), re.compile(r'chain_id="([0-9]+)"')
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that send, or wait for what was sent, by how their names begin.
_SENDING = (*_KINDS, "collective-", "ragged-all-to-all", "send", "recv")
_TO_HOST = "is_host_transfer=true"
_BITS = {"pred": 8, "s4": 4, "u4": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: `"all-gather"`, `"all-reduce"`, `"reduce-scatter"`, `"all-to-all"` or
        `"collective-permute"`.
      result_bytes: Its result on one device.
      shapes: Of its results, as `(dtype, sizes)`.
      group: Devices that take part together with device 0.
      trips: How often it runs in one call.
      loops: Loops around it.
      op_name: JAX's operation that it was made for.
    """

    kind: str
    result_bytes: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    group: tuple[int, ...]
    trips: float
    loops: int
    op_name: str

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends in one run of it."""
        size = len(self.group)
        share = (size - 1) / size
        return (
            self.result_bytes
            * {
                "all-gather": share,
                "all-reduce": 2 * share,
                "reduce-scatter": size - 1,
                "all-to-all": share,
                "collective-permute": 1,
            }[self.kind]
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a program sends in one call, from one device.

    Attributes:
      collectives: Every collective that the program reaches.
      understood: How much of the program's text was understood.
    """

    collectives: tuple[Collective, ...]
    understood: Understood

    @property
    def bytes(self) -> int:
        """Bytes that one device sends."""
        return round(sum(one.trips * one.sent_bytes for one in self.collectives))

    def seconds(self, links: Links) -> float:
        """Returns the seconds that links need for it, one collective after another."""
        return sum(one.trips * one.sent_bytes / links.rate(one.group) for one in self.collectives)


def traffic(text: str, num_devices: int) -> Traffic:
    """Returns the collectives of a compiled program.

    Args:
      text: `compiled.as_text()`.
      num_devices: Devices that it runs on.
    """
    reader = _Reader(Program(text), num_devices)
    return Traffic(collectives=tuple(reader.collectives()), understood=reader.understood())


class _Reader:
    """Reads the collectives of a program."""

    def __init__(self, program: Program, num_devices: int):
        self._program, self._num_devices = program, num_devices
        self._known: dict[str, bool] = {}
        self._misread: set[str] = set()

    def understood(self) -> Understood:
        """Returns how much was understood, when the collectives have been asked for."""
        known = self._program.understood
        if self._program.entry is None:  # nothing is reached
            return Understood(0, max(1, known.of))
        return Understood(known.lines - len(self._misread), known.of)

    def collectives(self) -> Iterator[Collective]:
        """Yields every collective that the entry reaches."""
        if self._program.entry is None:
            return
        seen = set()
        for identity, one in self._of(self._program.entry, 1.0, 0, False):
            if identity is None or identity not in seen:
                seen.add(identity)
                yield one

    def _of(
        self, name: str, trips: float, loops: int, is_fused: bool
    ) -> Iterator[tuple[tuple | None, Collective]]:
        """Yields what a computation sends, once for each way to it.

        A collective that is spread over several fusions stands in each of them, so one of a fusion
        comes with what it is told by. Channels alone do not tell: all of a `jax.shard_map` are 1.
        """
        if not self._has_any(name):
            return
        for line in self._program.lines[name]:
            found = INSTRUCTION.match(line)
            if found is None:
                continue
            kind = _kind_of(found[4])
            if kind is not None:
                made = self._collective(kind, found[3], found[4], line, name, trips, loops)
                yield _identity(made, line) if is_fused else None, made
                continue
            is_loop = found[4] == "while"
            inner = trips * self._program.trips(line) if is_loop else trips
            fused = is_fused or found[4] == "fusion"
            if (is_loop and not self._program.knows_loop(line)) or _is_unknown(found[4], line):
                self._misread.add(line)
            for inside in called(line):
                yield from self._of(inside, inner, loops + is_loop, fused)

    def _has_any(self, name: str) -> bool:
        """Whether a computation holds a collective, or calls one that does."""
        if name not in self._known:
            lines = self._program.lines.get(name, [])
            self._known[name] = any(map(self._leads_to_one, lines))
        return self._known[name]

    def _leads_to_one(self, line: str) -> bool:
        found = INSTRUCTION.match(line)
        is_one = found is not None and found[4].startswith(_SENDING)
        return is_one or any(map(self._has_any, called(line)))

    def _collective(self, kind, shape: str, operation: str, line: str, name, trips, loops):
        shapes = tuple(
            (dtype, tuple(map(int, sizes.split(","))) if sizes else ())
            for dtype, sizes in _SHAPE.findall(shape)
        )
        group = first_group(line, self._num_devices)
        if operation.endswith("-start"):
            shapes = _results(kind, shapes)
        if not (shapes and says_group(line)):
            self._misread.add(line)
        size = sum(_nbytes(*one) for one in shapes)
        if kind == "all-reduce" and self._is_scattered(name):
            kind, size = "reduce-scatter", size // len(group)
        return Collective(
            kind=kind,
            result_bytes=size,
            shapes=shapes,
            group=group,
            trips=trips,
            loops=loops,
            op_name=op_name(line),
        )

    def _is_scattered(self, name: str) -> bool:
        """Whether a fused reduction is cut at once: how a TPU's program writes a reduce-scatter."""
        lines = self._program.lines[name]
        return len(lines) < 10 and "dynamic-slice(%all-reduce" in lines[-1]


def _kind_of(operation: str) -> str | None:
    return next((k for k in _KINDS if operation in (k, f"{k}-start")), None)


def _identity(one: Collective, line: str) -> tuple:
    """Returns what the pieces of a collective have in common, wherever they stand."""
    numbers = tuple(found and found[1] for found in (_CHANNEL.search(line), _CHAIN.search(line)))
    return *numbers, one.kind, one.shapes, one.group, one.op_name


def _is_unknown(operation: str, line: str) -> bool:
    """Whether an operation sends between devices in a way that is not counted."""
    waits = operation.endswith(("-done", "-update"))
    return operation.startswith(_SENDING) and not waits and _TO_HOST not in line


def _results(kind: str, shapes):
    """Returns the results among what a collective that runs apart has: operands, results, more."""
    if kind == "all-reduce":
        return shapes
    shapes = [one for one in shapes if one[1]]
    return tuple(shapes[len(shapes) // 2 :])


def _nbytes(dtype: str, sizes: tuple[int, ...]) -> int:
    digits = re.match(r"[a-z]*([0-9]*)", dtype)
    bits = _BITS.get(dtype) or int((digits and digits[1]) or 8)
    return math.prod(sizes) * bits // 8
