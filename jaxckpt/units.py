"""Bytes as people write them: `parse_bytes("15GiB")` in, `iec(n)` out. Standard library only."""

import math
import re

from jaxckpt.plans.errors import nearest

# GB counts in 1000s and GiB in 1024s, as the IEC defines: 16 GB is 7 % less than 16 GiB.
_UNITS = {"B": 1} | {
    name: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for name, base in ((f"{prefix}B", 1000), (f"{prefix}iB", 1024))
}
_EXAMPLES = "15GiB, 16GB, 1.5e9, 12345"
_NUMBER = re.compile(r"\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: str | int | float) -> int:
    """Returns a number of bytes, rounded down.

    Args:
      size: A number of bytes, or text of a number and an optional unit. `B`, `KB`, `MB`, `GB`, `TB`
        count in 1000s, `KiB`, `MiB`, `GiB`, `TiB` in 1024s.

    Raises:
      ValueError: `size` is no size, or not above zero.

    Example:
      >>> parse_bytes("15GiB"), parse_bytes("16GB"), parse_bytes("1.5e9"), parse_bytes(12345)
      (16106127360, 16000000000, 1500000000, 12345)
    """
    if isinstance(size, bool) or not isinstance(size, str | int | float):
        raise ValueError(f"size {size!r} is not a number of bytes; valid: {_EXAMPLES}")
    value = _value(size) if isinstance(size, str) else size
    if not math.isfinite(value) or value < 1:
        raise ValueError(f"size {size!r} is not at least one byte")
    return int(value)


def _value(text: str) -> float | int:
    found = _NUMBER.fullmatch(text)
    if not found:
        raise ValueError(f"size {text!r} is not a number of bytes; valid: {_EXAMPLES}")
    number, unit = found[1].replace("_", ""), found[2] or "B"
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if unit.lower() not in units:
        guess = nearest(unit, _UNITS)
        raise ValueError(f"size {text!r}: unit {unit!r}{guess}; valid: {', '.join(_UNITS)}")
    return (int(number) if number.isdigit() else float(number)) * units[unit.lower()]


def unit_of(size: str | int | float) -> str:
    """Returns the unit that a size spells, as the table of units does; `""` if it spells none.

    Example:
      >>> unit_of("900 mib"), unit_of("1.5e9"), unit_of("auto"), unit_of(12)
      ('MiB', '', '', '')
    """
    found = _NUMBER.fullmatch(size) if isinstance(size, str) else None
    spelled = found[2].lower() if found else ""
    return next((unit for unit in _UNITS if unit.lower() == spelled), "")


def in_unit(size: float, unit: str = "") -> str:
    """Returns bytes as text in a unit; without one, in the unit that `iec` takes.

    Example:
      >>> in_unit(2**30, "MiB"), in_unit(2**30), in_unit(2**30, "GB"), in_unit(4864, "MiB")
      ('1024.00 MiB', '1.00 GiB', '1.07 GB', '0.0046 MiB')
    """
    if unit in ("", "B"):
        return f"{size:.0f} B" if unit else iec(size)
    value = size / _UNITS[unit]
    # Of a small share of the unit two digits that are not 0 are shown.
    zeros = -math.floor(math.log10(abs(value))) - 1 if 0 < abs(value) < 0.1 else 0
    return f"{value:.{min(2 + zeros, 9)}f} {unit}"


def iec(size: float) -> str:
    """Returns bytes as text, in the largest of GiB, MiB, KiB and B that fits once.

    Example:
      >>> iec(3 * 2**30), iec(2**19 + 2**20), iec(300)
      ('3.00 GiB', '1.50 MiB', '300 B')
    """
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    unit = next((name for name, one in units.items() if abs(size) >= one), None)
    return f"{size:.0f} B" if unit is None else f"{size / units[unit]:.2f} {unit}"
