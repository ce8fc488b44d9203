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
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from jaxckpt.memory.links import Links
from jaxckpt.transforms.trips import trips_of_name

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]")
_KNOWN_TRIPS = re.compile(r'known_trip_count[^0-9}]*"n":"([0-9]+)"')
_CONSTANT = re.compile(r" [su](?:32|64)\[\]\S* constant\(([0-9]+)\)")
_COUNTER = re.compile(r"get-tuple-element\(.*\), index=([0-9]+)")
_CHANNEL = re.compile(r"channel_id=([0-9]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_LISTED = re.compile(r"replica_groups=\{\{([0-9,]+)\}")
_IOTA = re.compile(r"replica_groups=(?:\[([0-9,]+)\]<=)?\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\))? \{([^}]*)\}"
)
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
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
    """What a program sends in one call, from one device."""

    collectives: tuple[Collective, ...]

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
    return Traffic(collectives=tuple(_Program(text, num_devices).collectives()))


@dataclasses.dataclass
class _Computation:
    name: str
    lines: list[str] = dataclasses.field(default_factory=list)


class _Program:
    """A program's text as computations that call one another."""

    def __init__(self, text: str, num_devices: int):
        self._num_devices = num_devices
        self._computations: dict[str, _Computation] = {}
        self._entry, current = None, None
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                current = self._computations[header[2]] = _Computation(name=header[2])
                self._entry = header[2] if header[1] else self._entry
            elif current is not None and "=" in line:
                current.lines.append(line)

    def collectives(self) -> Iterator[Collective]:
        """Yields every collective that the entry reaches."""
        if self._entry is None:
            return
        seen = set()
        for channel, one in self._of(self._entry, 1.0, 0):
            # One that is spread over several fusions stands in each of them.
            if channel is None or channel not in seen:
                seen.add(channel)
                yield one

    def _of(self, name: str, trips: float, loops: int) -> Iterator[tuple[str | None, Collective]]:
        """Yields what a computation sends, with its channel, once for each way to it."""
        if not self._has_any(name):
            return
        for line in self._computations[name].lines:
            found = _INSTRUCTION.match(line)
            if found is None:
                continue
            kind = _kind_of(found[4])
            if kind is not None:
                channel = _CHANNEL.search(line)
                made = self._collective(kind, found[3], found[4], line, name, trips, loops)
                yield channel and channel[1], made
                continue
            is_loop = found[4] == "while"
            inner = trips * self._trips(line) if is_loop else trips
            for called in _called(line):
                yield from self._of(called, inner, loops + is_loop)

    @functools.cache  # noqa: B019  a program lives as long as one call of `traffic`
    def _has_any(self, name: str) -> bool:
        """Whether a computation holds a collective, or calls one that does."""
        if name not in self._computations:
            return False
        return any(
            ((found := _INSTRUCTION.match(line)) and _kind_of(found[4]) is not None)
            or any(self._has_any(called) for called in _called(line))
            for line in self._computations[name].lines
        )

    def _trips(self, line: str) -> float:
        known = _KNOWN_TRIPS.search(line)
        if known:
            return int(known[1])
        name = _OP_NAME.search(line)
        said = trips_of_name(name[1]) if name else None
        if said is not None:
            return float(said)
        parts = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
        if parts is None or not {*parts.groups()} <= self._computations.keys():
            return 1
        bound, counter = self._bound(parts[1])
        return bound / self._increment(parts[2], counter)

    def _bound(self, condition: str) -> tuple[int, int | None]:
        """Returns what a loop's condition compares with, and where the counter is in its state.

        The bound is the condition's largest constant, or 1.
        """
        lines = [*self._computations[condition].lines]
        counters = [int(n) for line in lines for n in _COUNTER.findall(line)]
        for called in [name for line in lines for name in _called(line)]:
            lines += self._computations[called].lines
        bound = max((int(n) for line in lines for n in _CONSTANT.findall(line)), default=1)
        return bound, counters[0] if len(counters) == 1 else None

    def _increment(self, body: str, counter: int | None) -> int:
        """Returns what a loop's body adds to its counter: more than 1 where trips were joined."""
        made = {
            found[2]: line
            for line in self._computations[body].lines
            if (found := _INSTRUCTION.match(line))
        }
        root = next((line for line in made.values() if line.lstrip().startswith("ROOT")), "")
        state = _operands(root)
        if counter is None or " tuple(" not in root or counter >= len(state):
            return 1
        added = made.get(state[counter], "")
        if " add(" not in added:
            return 1
        sizes = [n for name in _operands(added) for n in _CONSTANT.findall(made.get(name, ""))]
        return max(1, int(sizes[0])) if len(sizes) == 1 else 1

    def _collective(self, kind, shape: str, operation: str, line: str, name, trips, loops):
        shapes = tuple(
            (dtype, tuple(map(int, sizes.split(","))) if sizes else ())
            for dtype, sizes in _SHAPE.findall(shape)
        )
        group = _group(line, self._num_devices)
        if operation.endswith("-start"):
            shapes = _results(kind, shapes)
        size = sum(_nbytes(*one) for one in shapes)
        if kind == "all-reduce" and self._is_scattered(name):
            kind, size = "reduce-scatter", size // len(group)
        op_name = _OP_NAME.search(line)
        return Collective(
            kind=kind,
            result_bytes=size,
            shapes=shapes,
            group=group,
            trips=trips,
            loops=loops,
            op_name=op_name[1] if op_name else "",
        )

    def _is_scattered(self, name: str) -> bool:
        """Whether a fused reduction is cut at once: how a TPU's program writes a reduce-scatter."""
        lines = self._computations[name].lines
        return len(lines) < 10 and "dynamic-slice(%all-reduce" in lines[-1]


def _operands(line: str) -> list[str]:
    """Returns the names of what an instruction is given."""
    found = _INSTRUCTION.match(line)
    return re.findall(r"%([\w.\-]+)", line[found.end() :].partition(")")[0]) if found else []


def _kind_of(operation: str) -> str | None:
    return next((k for k in _KINDS if operation in (k, f"{k}-start")), None)


def _called(line: str) -> list[str]:
    found = _CALLED.findall(line)
    branches = _BRANCHES.search(line)
    if branches:
        found += [name.strip().lstrip("%") for name in branches[1].split(",")]
    return found


def _results(kind: str, shapes):
    """Returns the results among what a collective that runs apart has: operands, results, more."""
    if kind == "all-reduce":
        return shapes
    shapes = [one for one in shapes if one[1]]
    return tuple(shapes[len(shapes) // 2 :])


def _nbytes(dtype: str, sizes: tuple[int, ...]) -> int:
    digits = re.sub(r"^[a-z]+", "", dtype)
    bits = _BITS.get(dtype) or int(re.match(r"[0-9]+", digits)[0] if digits else 8)
    return math.prod(sizes) * bits // 8


def _group(line: str, num_devices: int) -> tuple[int, ...]:
    """Returns the devices of the first group of a collective's line."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        first = re.match(r"\{([0-9]+),([0-9]+)", pairs[1])
        return tuple(dict.fromkeys(map(int, first.groups()))) if first else (0, 1)
    listed = _LISTED.search(line)
    if listed:
        return _numbers(listed[1])
    mesh = _MESH.search(line)
    if mesh:
        return _mesh_group(*mesh.groups())
    iota = _IOTA.search(line)
    if iota:
        devices = _permuted(iota[2], iota[3])
        groups = _numbers(iota[1]) if iota[1] else (1, devices.size)
        return tuple(map(int, devices.reshape(groups)[0]))
    return tuple(range(num_devices))


def _mesh_group(axes: str, sizes: str | None, order: str | None, over: str) -> tuple[int, ...]:
    found = re.findall(r"'([^']*)'=([0-9]+)", axes)
    shape = [int(size) for _, size in found]
    devices = np.arange(math.prod(shape)) if sizes is None else _permuted(sizes, order)
    devices = devices.reshape(shape)
    named = re.findall(r"'([^']*)'", over)
    index = tuple(slice(None) if name in named else 0 for name, _ in found)
    return tuple(map(int, devices[index].reshape(-1)))


def _permuted(sizes: str, order: str | None) -> np.ndarray:
    devices = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return devices.transpose(_numbers(order)) if order else devices


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
