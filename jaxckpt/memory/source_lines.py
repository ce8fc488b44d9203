"""Source lines of instructions in a dumped XLA program. No JAX import.

Older XLA writes `source_file` and `source_line` into an instruction's metadata. Newer XLA writes
the number of a stack frame, and tables of frames, locations and file names at the program's top;
there the innermost frame outside of installed packages is taken: the user's own line.
"""

import re

from jaxckpt.memory.understood import Understood

_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_INSTALLED = ("/site-packages/", "/jaxckpt/transforms/", "/jaxckpt/models/", "/jaxckpt/memory/")


class SourceLines:
    """Finds the source line of an instruction from its metadata.

    Attributes:
      understood: How many rows of the tables lead somewhere.
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
        # Frames that instructions speak of, and no table of them.
        missing = not frames and "stack_frame_id=" in program
        self.understood = Understood(sum(known), len(known) + missing)

    def of(self, metadata: str) -> str:
        """Returns `file.py:line`, or "" where the metadata does not lead to one."""
        file = re.search(r'source_file="([^"]*)"', metadata)
        if file:
            return f"{file[1]}:{_field(metadata, 'source_line')}"
        found = [line for line in self._stack(_field(metadata, "stack_frame_id")) if line[0]]
        own = [line for line in found if not any(part in line[0] for part in _INSTALLED)]
        chosen = (own or found)[:1]
        return f"{chosen[0][0]}:{chosen[0][1]}" if chosen else ""

    def _stack(self, frame: int) -> list[tuple[str, int]]:
        """Returns files and lines from the innermost frame outward."""
        found = []
        # A root's parent is written as 0 by some versions and as the root itself by others, which
        # count parents from one more; a frame never comes after those it was called from.
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
