"""The largest buffers of a compiled program, read from an `xla_dump_to` folder. No JAX import.

XLA dumps a buffer assignment (every allocation and its values) and, since jaxlib 0.8 or so, the
values that are alive at the peak. `read_buffers` lists the largest live values; if that list is
missing, the largest values that share no memory. An instruction's name leads to its operation and
source line in the program's text. These texts are for people and change with every version: lines
that are not understood are left out and counted, and nothing here raises.

`SourceLines` finds an instruction's source line. Older XLA writes `source_file` and `source_line`
into an instruction's metadata. Newer XLA writes the number of a stack frame, and tables of frames,
locations and file names at the program's top. Then the innermost frame outside of libraries
(`jaxckpt.sources`) is taken: the user's own line, or the model's.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxckpt.sources import is_machinery

_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


class SourceLines:
    """Finds the source line of an instruction from its metadata.

    Attributes:
      understood: How many rows of the tables refer to rows that exist.
    """

    def __init__(self, program: str):
        files, _, locations, frames = (_table(program, name) for name in _TABLES)
        self._files = {number: text.strip('"') for number, text in files.items()}
        self._lines = {}
        for number, text in locations.items():
            file, line = _field(text, "file_name_id"), _field(text, "line")
            self._lines[number] = (self._files.get(file, ""), line)
        self._frames = {
            number: (_field(text, "file_location_id"), _field(text, "parent_frame_id"))
            for number, text in frames.items()
        }
        known = [name in self._files.values() for name, _ in self._lines.values()]
        known += [location in self._lines for location, _ in self._frames.values()]
        # Instructions refer to frames, but the table of frames is missing.
        missing = not frames and "stack_frame_id=" in program
        self.understood = Understood(sum(known), len(known) + missing)

    def of(self, metadata: str) -> str:
        """Returns `file.py:line`; "" if the metadata does not lead to a line."""
        file = re.search(r'source_file="([^"]*)"', metadata)
        if file:
            return f"{file[1]}:{_field(metadata, 'source_line')}"
        found = [line for line in self._stack(_field(metadata, "stack_frame_id")) if line[0]]
        own = [line for line in found if not is_machinery(line[0])]
        chosen = (own or found)[:1]
        return f"{chosen[0][0]}:{chosen[0][1]}" if chosen else ""

    def _stack(self, frame: int) -> list[tuple[str, int]]:
        """Returns files and lines from the innermost frame outward."""
        found = []
        # Some versions write a root's parent as 0. Others write the root itself, and count parents
        # from one more. In both, a frame never comes before its callers.
        shift = self._frames.get(1, (0, 0))[1]
        while frame in self._frames and len(found) < len(self._frames):
            location, parent = self._frames[frame]
            found.append(self._lines.get(location, ("", 0)))
            frame = parent - shift
        return found


def _table(program: str, name: str) -> dict[int, str]:
    found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", program, re.M)
    rows = (line.split(" ", 1) for line in found[1].splitlines()) if found else ()
    return {int(number): text for number, text in rows}


def _field(text: str, name: str) -> int:
    found = re.search(rf"\b{name}=(\d+)", text)
    return int(found[1]) if found else 0


_MOST_BUFFERS = 20
_ASSIGNMENT = "-buffer-assignment.txt"
_TOTAL = re.compile(r"Total bytes(?: used)?: (\d+)")
_ALLOCATION = re.compile(r"allocation (\d+):.*?size (\d+)(.*)")
_VALUE = re.compile(
    r"\s+value: <\d+ (?P<name>\S+?)(?:\{(?P<index>[\d,]*)\})?(?P<phi> \(phi\))? @\d+> "
    r"\(size=(?P<size>\d+),offset=(?P<offset>\d+)\): (?P<shape>.+)"
)
_PEAK = re.compile(r"Live ranges at \d+ \(peak\):\n((?:    \S+: \d+ bytes.*\n)*)")
_ALIVE = re.compile(r"    (\S+?)\{([\d,]*)\}: (\d+) bytes")
_LAYOUT = re.compile(r"\{[^{}]*\}")
_WHOLE = '/call_exported"'  # the op_name of an exported program as a whole
_METADATA = re.compile(r"^\s*(?:ROOT )?%?(?P<name>\S+) = .*?metadata=\{(?P<text>[^}]*)\}", re.M)


@dataclasses.dataclass(frozen=True)
class Understood:
    """How many lines of a compiler's text were understood.

    Attributes:
      lines: The number of lines that were understood.
      of: The number of lines that were read and that a figure may come from.
    """

    lines: int = 0
    of: int = 0

    def __add__(self, other: "Understood") -> "Understood":
        return Understood(self.lines + other.lines, self.of + other.of)

    @property
    def is_all(self) -> bool:
        """Whether every line was understood."""
        return self.lines == self.of

    @property
    def is_enough(self) -> bool:
        """Whether less than a hundredth was left out: figures of other lines make no difference."""
        return self.lines >= 0.99 * self.of

    def __str__(self) -> str:
        return f"understood {self.lines} of {self.of} lines of XLA's text"


NOTHING_READ = Understood()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """One value in memory.

    Attributes:
      size_bytes: The bytes that it takes, with padding.
      shape: The dtype and dimensions, `bf16[24,20000,2048]`.
      operation: JAX's name of the operation that made it; else the name of the instruction.
      source: `file.py:line`; "" if the compiler does not say.
    """

    size_bytes: int
    shape: str
    operation: str
    source: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Totals:
    """Bytes of the device's main memory; `total_bytes` is what the whole program needs."""

    total_bytes: int
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0


class _Value(NamedTuple):
    allocation: int
    name: str
    index: str
    phi: bool
    size: int
    offset: int
    shape: str


def read_buffers(folder: Path) -> tuple[Buffer, ...]:
    """Returns the largest buffers of the largest program that was dumped, largest first."""
    stem = _largest(folder)
    if stem is None:
        return ()
    assignment = _read(f"{stem}{_ASSIGNMENT}")
    every = list(_values(assignment))
    alive = {(n, index) for n, index, _ in _ALIVE.findall(_peak(_read(f"{stem}-live-range.txt")))}
    if "color" in assignment:
        # The list is of the moment when all memory spaces together are fullest, on-chip and host
        # memory included. Main memory may peak at another moment.
        alive = set()
    values = [v for v in every if (v.name, v.index) in alive] or every
    program = _read(f"{stem}.txt")
    metadata = {found["name"]: found["text"] for found in _METADATA.finditer(program)}
    lines, buffers = SourceLines(program), []
    for value in _disjoint(values):
        text = _description(value, every, metadata)
        operation = re.search(r'op_name="([^"]*)"', text)
        assert operation is not None, text  # every description has one
        buffers.append(
            Buffer(
                size_bytes=value.size,
                shape=_LAYOUT.sub("", value.shape),
                operation=operation[1].replace("\\'", "'"),
                source=lines.of(text),
            )
        )
    return tuple(buffers)


def read_totals(folder: Path) -> Totals | None:
    """Returns the totals of the largest dumped program, even if it did not fit."""
    stem = _largest(folder)
    if stem is None:
        return None
    allocations = _ALLOCATION.findall(_read(f"{stem}{_ASSIGNMENT}"))
    kinds = [(int(size), kind) for _, size, kind in allocations if "color" not in kind]
    if not kinds:
        return None
    is_argument = lambda kind: re.search(r"\bparameter \d", kind) is not None
    return Totals(
        total_bytes=sum(size for size, _ in kinds),
        argument_bytes=sum(size for size, kind in kinds if is_argument(kind)),
        output_bytes=sum(size for size, kind in kinds if "maybe-live-out" in kind),
        alias_bytes=sum(s for s, kind in kinds if is_argument(kind) and "maybe-live-out" in kind),
    )


def read_understood(folder: Path) -> Understood:
    """Returns how much of the largest dumped program was understood; 0 of 0 for an empty folder.

    The lines counted are the sources of buffers, totals and source lines.
    """
    stem = _largest(folder)
    if stem is None:
        return Understood(0, len([*folder.glob(f"*{_ASSIGNMENT}")]))
    assignment, live_range, program = (
        _read(f"{stem}{end}") for end in (_ASSIGNMENT, "-live-range.txt", ".txt")
    )
    # The first line is a title. Older versions write uses and positions after a blank line.
    lines = assignment.partition("\n\n")[0].splitlines()[1:]
    is_read = lambda line: (_ALLOCATION.match(line) or _VALUE.match(line)) is not None
    found = Understood(sum(map(is_read, lines)), max(1, len(lines)))
    if live_range:
        found += Understood(int(_peak(live_range) != ""), 1)
    named = sum('op_name="' in line for line in program.splitlines())
    found += Understood(sum('op_name="' in text for _, text in _METADATA.findall(program)), named)
    return found + SourceLines(program).understood


def _largest(folder: Path) -> str | None:
    """Returns the common beginning of the paths of the largest program's files."""
    stems = [str(path).removesuffix(_ASSIGNMENT) for path in folder.glob(f"*{_ASSIGNMENT}")]
    stems = [stem for stem in stems if _total(stem)]
    return max(stems, key=_total, default=None)


def _total(stem: str) -> int:
    found = _TOTAL.search(_read(f"{stem}-memory-usage-report.txt"))
    return int(found[1]) if found else 0


def _values(assignment: str) -> Iterator[_Value]:
    """Yields the values in main memory; `color` marks allocations in other memory spaces."""
    allocation, is_main = -1, False
    for line in assignment.splitlines():
        if head := _ALLOCATION.match(line):
            allocation, is_main = int(head[1]), "color" not in head[3]
        elif is_main and (found := _VALUE.match(line)):
            name, index, phi, size, offset, shape = found.groups()
            size, offset, phi = int(size), int(offset), phi is not None
            yield _Value(allocation, name, index or "", phi, size, offset, shape)


def _peak(live_range: str) -> str:
    found = _PEAK.search(live_range)
    return found[1] if found else ""


def _disjoint(values: list[_Value]) -> list[_Value]:
    """Returns the largest values that share no memory; of equal values, loop copies come last."""
    chosen: list[_Value] = []
    ends = lambda value: value.offset + value.size
    for value in sorted(values, key=lambda v: (-v.size, v.phi, v.allocation, v.offset)):
        if len(chosen) == _MOST_BUFFERS:
            break
        beside = (other for other in chosen if other.allocation == value.allocation)
        if all(ends(value) <= other.offset or ends(other) <= value.offset for other in beside):
            chosen.append(value)
    return chosen


def _description(value: _Value, every: list[_Value], metadata: dict[str, str]) -> str:
    """Returns the metadata of a value, or of the instruction that updates it in place.

    A loop's stacked output is allocated by an instruction without metadata. The update in the
    loop's body, in the same memory, has the metadata of the stacked values.
    """
    place = (value.allocation, value.offset, value.size)
    same = [v.name for v in every if (v.allocation, v.offset, v.size) == place]
    texts = [metadata.get(name, "") for name in (value.name, *same)]
    texts = [text for text in texts if "op_name=" in text and _WHOLE not in text]
    return texts[0] if texts else f'op_name="{value.name}"'


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
