"""Collectives of a compiled program: the bytes it sends between devices, read from XLA's text.

    sent = traffic(compiled.as_text(), num_devices=8)
    sent.bytes, sent.seconds(links)

The partitioner inserts collectives, so a jaxpr does not show them. The compiled text shows each
with its shape and its groups, and the loops around it. Trips are read from a loop's bound. The
executor's loops have no bound in the program; their mean trips are in their names
(`transforms.jaxprs.trips`).

Bytes are what one device sends in a ring: a gather of n bytes over g devices sends n (g - 1) / g, a
reduction twice as much (Thakur et al. 2005, Optimization of collective communication operations in
MPICH, section 4).

The text is read as computations that call one another, with the trips of their loops. The devices
of a collective are written as a list, an iota, or axes of a mesh.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from jaxckpt.compiled.buffers import Understood
from jaxckpt.targets.links import Links
from jaxckpt.transforms.jaxprs import says_trips, trips_of_name

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|called_computations|true_computation|false_computation)="
    r"\{?%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_KNOWN_TRIPS = re.compile(r'known_trip_count[^0-9}]*"n":"([0-9]+)"')
_CONSTANT = re.compile(r" [su](?:32|64)\[\]\S* constant\(([0-9]+)\)")
_PARTS = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_COUNTER = re.compile(r"get-tuple-element\(.*\), index=([0-9]+)")
# Lines above the computations: the module's line, and the tables of `buffers.py`.
_ABOVE = re.compile(
    r'HloModule |(?:FileNames|FunctionNames|FileLocations|StackFrames)$|[0-9]+ (?:"|\{)'
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Program:
    """A program's text, parsed into computations.

    Attributes:
      lines: The instructions of each computation, by its name.
      entry: The name of the entry computation; None if the text has none.
      understood: How many of the text's lines have a known form.
    """

    def __init__(self, text: str):
        self.lines: dict[str, list[str]] = {}
        self.entry, current = None, None
        known = read = 0
        for line in text.splitlines():
            if not line.strip() or line.startswith("}"):
                continue
            header, is_known = _HEADER.match(line), True
            if header:
                current = self.lines[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif current is None:
                is_known = _ABOVE.match(line) is not None
            else:
                is_known = INSTRUCTION.match(line) is not None
                current.append(line)
            known, read = known + is_known, read + 1
        self.understood = Understood(known, read)

    def trips(self, line: str) -> float:
        """Returns how often a loop runs its body, from the text or from the loop's name."""
        known = _KNOWN_TRIPS.search(line)
        if known:
            return int(known[1])
        name = op_name(line)
        said = trips_of_name(name)
        if said is not None:
            return float(said)
        parts = self._parts(line)
        if parts is None:
            return 1
        bound, counter = self._bound(parts[0])
        return bound / self._increment(parts[1], counter)

    def knows_loop(self, line: str) -> bool:
        """Returns whether a loop's condition, body and trips (if its name has any) can be read."""
        name = op_name(line)
        is_read = not says_trips(name) or trips_of_name(name) is not None
        return is_read and self._parts(line) is not None

    def _parts(self, line: str) -> tuple[str, str] | None:
        """Returns the condition and the body of a loop; None if they are not in the text."""
        found = _PARTS.search(line)
        return (found[1], found[2]) if found and {*found.groups()} <= self.lines.keys() else None

    def _bound(self, condition: str) -> tuple[int, int | None]:
        """Returns a loop's bound, and the place of the counter in its state.

        The bound is the largest constant in the condition, or 1.
        """
        lines = [*self.lines[condition]]
        counters = [int(n) for line in lines for n in _COUNTER.findall(line)]
        for name in [name for line in lines for name in called(line)]:
            lines += self.lines.get(name, [])
        bound = max((int(n) for line in lines for n in _CONSTANT.findall(line)), default=1)
        return bound, counters[0] if len(counters) == 1 else None

    def _increment(self, body: str, counter: int | None) -> int:
        """Returns what a loop's body adds to its counter; more than 1 if XLA joined trips."""
        made = {found[2]: line for line in self.lines[body] if (found := INSTRUCTION.match(line))}
        root = next((line for line in made.values() if line.lstrip().startswith("ROOT")), "")
        state = _operands(root)
        if counter is None or " tuple(" not in root or counter >= len(state):
            return 1
        added = made.get(state[counter], "")
        if " add(" not in added:
            return 1
        sizes = [n for name in _operands(added) for n in _CONSTANT.findall(made.get(name, ""))]
        return max(1, int(sizes[0])) if len(sizes) == 1 else 1


def op_name(line: str) -> str:
    """Returns JAX's name of the operation that an instruction was made for; "" if it has none."""
    found = _OP_NAME.search(line)
    return found[1] if found else ""


def called(line: str) -> list[str]:
    """Returns the computations that an instruction calls."""
    found = _CALLED.findall(line)
    branches = _BRANCHES.search(line)
    if branches:
        found += [name.strip().lstrip("%") for name in branches[1].split(",")]
    return found


def _operands(line: str) -> list[str]:
    found = INSTRUCTION.match(line)
    return re.findall(r"%([\w.\-]+)", line[found.end() :].partition(")")[0]) if found else []


_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]")
_CHANNEL, _CHAIN = re.compile(r"channel_id=([0-9]+)"), re.compile(r'chain_id="([0-9]+)"')
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that send, or wait for a transfer, by the beginnings of their names.
_SENDING = (*_KINDS, "collective-", "ragged-all-to-all", "send", "recv")
_TO_HOST = "is_host_transfer=true"
_BITS = {"pred": 8, "s4": 4, "u4": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: A word of `_KINDS`, such as `"all-gather"`.
      result_bytes: The bytes of its result on one device.
      shapes: The shapes of its results, as `(dtype, sizes)`.
      group: The devices of the group of device 0.
      trips: How often it runs in one call.
      loops: The number of loops around it.
      op_name: JAX's name of the operation that it was made for.
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
        """The bytes that one device sends in one run of the collective."""
        size = len(self.group)
        share = (size - 1) / size
        factors = {"all-gather": share, "all-to-all": share, "all-reduce": 2 * share}
        factors |= {"reduce-scatter": size - 1, "collective-permute": 1}
        return self.result_bytes * factors[self.kind]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """The collectives that one device runs in one call of a program.

    Attributes:
      collectives: Every collective that the program reaches.
      understood: How much of the program's text was understood.
    """

    collectives: tuple[Collective, ...]
    understood: Understood

    @property
    def bytes(self) -> int:
        """The bytes that one device sends in one call."""
        return round(sum(one.trips * one.sent_bytes for one in self.collectives))

    def seconds(self, links: Links) -> float:
        """Returns the seconds that the links need, one collective after another."""
        return sum(one.trips * one.sent_bytes / links.rate(one.group) for one in self.collectives)


def traffic(text: str, num_devices: int) -> Traffic:
    """Returns the collectives of `compiled.as_text()`, a program that runs on `num_devices`."""
    program = Program(text)
    if program.entry is None:  # no collective can be reached
        return Traffic(collectives=(), understood=Understood(0, max(1, program.understood.of)))
    reader, found, seen = _Reader(program, num_devices), [], set()
    for identity, one in reader.reached(program.entry):
        if identity is None or identity not in seen:
            seen.add(identity)
            found.append(one)
    known = program.understood
    understood = Understood(known.lines - len(reader.misread), known.of)
    return Traffic(collectives=tuple(found), understood=understood)


class _Reader:
    """Reads the collectives of a program; `misread` has the lines that it cannot read."""

    def __init__(self, program: Program, num_devices: int):
        self._program, self._num_devices = program, num_devices
        self._known: dict[str, bool] = {}
        self.misread: set[str] = set()

    def reached(
        self, name: str, trips: float = 1.0, loops: int = 0, is_fused: bool = False
    ) -> Iterator[tuple[tuple | None, Collective]]:
        """Yields a computation's collectives with an identity, once for each call that reaches it.

        XLA may spread a collective over several fusions and write it into each. Such pieces share
        an identity; a collective outside of fusions has None. Channels are no identity: in a
        `jax.shard_map` all of them are 1.
        """
        if not self._has_any(name):
            return
        for line in self._program.lines[name]:
            found = INSTRUCTION.match(line)
            if found is None:
                continue
            kind = next((k for k in _KINDS if found[4] in (k, f"{k}-start")), None)
            if kind is not None:
                made = self._collective(kind, found[3], found[4], line, name, trips, loops)
                yield _identity(made, line) if is_fused else None, made
                continue
            is_loop = found[4] == "while"
            inner = trips * self._program.trips(line) if is_loop else trips
            fused = is_fused or found[4] == "fusion"
            if (is_loop and not self._program.knows_loop(line)) or _is_unknown(found[4], line):
                self.misread.add(line)
            for inside in called(line):
                yield from self.reached(inside, inner, loops + is_loop, fused)

    def _has_any(self, name: str) -> bool:
        """Whether a computation, or one that it calls, holds a collective."""
        if name not in self._known:
            self._known[name] = any(
                ((found := INSTRUCTION.match(line)) and found[4].startswith(_SENDING))
                or any(map(self._has_any, called(line)))
                for line in self._program.lines.get(name, [])
            )
        return self._known[name]

    def _collective(self, kind, shape: str, operation: str, line: str, name, trips, loops):
        shapes = tuple(
            (dtype, tuple(map(int, sizes.split(","))) if sizes else ())
            for dtype, sizes in _SHAPE.findall(shape)
        )
        group = first_group(line, self._num_devices)
        if operation.endswith("-start") and kind != "all-reduce":
            # An asynchronous collective names operands, results and others.
            shapes = tuple(one for one in shapes if one[1])
            shapes = shapes[len(shapes) // 2 :]
        if not (shapes and says_group(line)):
            self.misread.add(line)
        size = sum(_nbytes(*one) for one in shapes)
        around = self._program.lines[name]
        # A TPU's program writes a reduce-scatter as a fusion that slices an all-reduce.
        is_scattered = len(around) < 10 and "dynamic-slice(%all-reduce" in around[-1]
        if kind == "all-reduce" and is_scattered:
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


def _identity(one: Collective, line: str) -> tuple:
    """Returns a key that all pieces of a collective share."""
    numbers = tuple(found and found[1] for found in (_CHANNEL.search(line), _CHAIN.search(line)))
    return *numbers, one.kind, one.shapes, one.group, one.op_name


def _is_unknown(operation: str, line: str) -> bool:
    """Whether an operation sends between devices and is of no kind that is counted."""
    waits = operation.endswith(("-done", "-update"))
    return operation.startswith(_SENDING) and not waits and _TO_HOST not in line


def _nbytes(dtype: str, sizes: tuple[int, ...]) -> int:
    digits = re.match(r"[a-z]*([0-9]*)", dtype)
    bits = _BITS.get(dtype) or int((digits and digits[1]) or 8)
    return math.prod(sizes) * bits // 8


_LISTED = re.compile(r"replica_groups=\{\{([0-9,]+)\}")
_IOTA = re.compile(r"replica_groups=(?:\[([0-9,]+)\]<=)?\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{\{([0-9]+),([0-9]+)")


def first_group(line: str, num_devices: int) -> tuple[int, ...]:
    """Returns the devices of a collective's first group; all devices if it names none."""
    pairs = _PAIRS.search(line)
    if pairs:
        return tuple(dict.fromkeys(map(int, pairs.groups())))
    if listed := _LISTED.search(line):
        return _numbers(listed[1])
    if mesh := _MESH.search(line):
        return _mesh_group(*mesh.groups())
    if iota := _IOTA.search(line):
        devices = _permuted(iota[2], iota[3])
        groups = _numbers(iota[1]) if iota[1] else (1, devices.size)
        return tuple(map(int, devices.reshape(groups)[0]))
    return tuple(range(num_devices))


def says_group(line: str) -> bool:
    """Returns whether the groups of a collective can be read, or the line names none."""
    named = re.search(r"(?:replica_groups|source_target_pairs)=(?!\{\})", line)
    return named is None or any(form.search(line) for form in (_PAIRS, _LISTED, _MESH, _IOTA))


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
