"""libtpu's refusals read as numbers: a step that does not fit still has a peak. No JAX import.

libtpu raises RESOURCE_EXHAUSTED while it compiles, and words it differently in each version. All
wordings below are real; `tests/memory/oom_texts.json` keeps texts of libtpu 0.0.23, 0.0.42 and
0.0.50. The figures in a text are rounded, so where the compiler also left its buffer assignment
on disk (`buffers.read_totals`) that is what counts.
"""

import dataclasses
import re

from jaxckpt.memory.units import gib

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
        return f"{word} {gib(self.needed_bytes)}"


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
