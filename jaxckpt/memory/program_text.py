"""A compiled program's text as computations that call one another, and how often its loops run."""

import re

from jaxckpt.memory.understood import Understood
from jaxckpt.transforms.trips import says_trips, trips_of_name

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
# What stands above the computations: the module's line, and the tables of `source_lines.py`.
_ABOVE = re.compile(
    r'HloModule |(?:FileNames|FunctionNames|FileLocations|StackFrames)$|[0-9]+ (?:"|\{)'
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Program:
    """A program's text.

    Attributes:
      lines: The instructions of each computation.
      entry: The computation that is run; None in a text that has none.
      understood: How many of the text's lines have a form that is known.
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
        """Returns how often the body of a loop runs: as the text says, or as its name does."""
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
        """Returns whether a loop's condition and body are there, and its name's trips are read."""
        name = op_name(line)
        is_read = not says_trips(name) or trips_of_name(name) is not None
        return is_read and self._parts(line) is not None

    def _parts(self, line: str) -> tuple[str, str] | None:
        """Returns the condition and the body of a loop; None if they are not in the text."""
        found = _PARTS.search(line)
        return (found[1], found[2]) if found and {*found.groups()} <= self.lines.keys() else None

    def _bound(self, condition: str) -> tuple[int, int | None]:
        """Returns what a loop's condition compares with, and where the counter is in its state.

        The bound is the condition's largest constant, or 1.
        """
        lines = [*self.lines[condition]]
        counters = [int(n) for line in lines for n in _COUNTER.findall(line)]
        for name in [name for line in lines for name in called(line)]:
            lines += self.lines.get(name, [])
        bound = max((int(n) for line in lines for n in _CONSTANT.findall(line)), default=1)
        return bound, counters[0] if len(counters) == 1 else None

    def _increment(self, body: str, counter: int | None) -> int:
        """Returns what a loop's body adds to its counter: more than 1 where trips were joined."""
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
    """Returns the operation of JAX's that an instruction was made for, or nothing."""
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
    """Returns the names of what an instruction is given."""
    found = INSTRUCTION.match(line)
    return re.findall(r"%([\w.\-]+)", line[found.end() :].partition(")")[0]) if found else []
