"""Which devices a collective joins, as XLA's text says it: a list, an iota, or axes of a mesh."""

import math
import re

import numpy as np

_LISTED = re.compile(r"replica_groups=\{\{([0-9,]+)\}")
_IOTA = re.compile(r"replica_groups=(?:\[([0-9,]+)\]<=)?\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{\{([0-9]+),([0-9]+)")


def first_group(line: str, num_devices: int) -> tuple[int, ...]:
    """Returns the devices of the first group of a collective.

    Args:
      line: Its instruction.
      num_devices: Those of the program: all of them are a group where the line names none.
    """
    pairs = _PAIRS.search(line)
    if pairs:
        return tuple(dict.fromkeys(map(int, pairs.groups())))
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


def says_group(line: str) -> bool:
    """Returns whether the devices of a collective are read, or the line leaves them out."""
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
