"""Writing safetensors files: one, or shards and an index of what is where."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.shards import INDEX, SINGLE

# Readers of the format ask which library's layout of tensors it is; NumPy's is PyTorch's.
_METADATA = {"format": "pt"}


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, largest_bytes: int
) -> str:
    """Writes tensors in their order; returns what was written, for people.

    Args:
      folder: Where to; it is there and holds none yet.
      tensors: Names and contiguous arrays; one file's worth is in memory at a time.
      largest_bytes: Of a file; a larger tensor has one of its own.

    Raises:
      OSError: The disk is full, say.
    """
    files: list[dict[str, int]] = []
    pending: dict[str, np.ndarray] = {}
    for name, value in tensors:
        if pending and sum(x.nbytes for x in pending.values()) + value.nbytes > largest_bytes:
            files.append(_write(folder, len(files), pending))
            pending = {}
        pending[name] = value
    files.append(_write(folder, len(files), pending))
    total_bytes = sum(sum(sizes.values()) for sizes in files)
    _name(folder, files, total_bytes)
    count = sum(map(len, files))
    where = SINGLE if len(files) == 1 else f"{len(files)} files"
    return f"{count} tensors, {total_bytes / 1e9:.2f} GB, {where}"


def _write(folder: Path, index: int, tensors: dict[str, np.ndarray]) -> dict[str, int]:
    """Writes one file; returns the bytes of each tensor in it."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, folder / str(index), metadata=_METADATA)
    except SafetensorError as error:  # what the package makes of an OSError
        raise OSError(str(error)) from None
    (folder / str(index)).chmod(0o644)  # the package makes a file its owner's alone
    return {name: value.nbytes for name, value in tensors.items()}


def _name(folder: Path, files: list[dict[str, int]], total_bytes: int):
    """Gives the files their names, which say how many there are, and writes the index."""
    if len(files) == 1:
        (folder / "0").rename(folder / SINGLE)
        return
    weight_map = {}
    for index, names in enumerate(files):
        name = f"model-{index + 1:05}-of-{len(files):05}.safetensors"
        (folder / str(index)).rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
