"""Safetensors files of one model: a single file, or shards that an index lists.

Files are memory-mapped, and a tensor is read when it is used. Written are one file, or shards and
an index that names each tensor's file. No JAX.
"""

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  with it NumPy knows bfloat16, with JAX or without
import numpy as np

from experiments.config import ConfigError
from experiments.files import import_extra

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16"}  # the format's name -> NumPy's


class Shards:
    """The tensors of a folder.

    Attributes:
      shapes: The shape of each tensor, by name.
      dtypes: The dtype of each tensor, by name, as the format names it: `F32`, `BF16`.
    """

    def __init__(self, folder: Path):
        """Opens the files and reads the names, shapes and dtypes of their tensors.

        Raises:
          ConfigError: A file is missing or cannot be read, or two files have a tensor of one name.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        for path in _files_of(folder):
            file = _open(path)
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                if name in self._files:
                    raise ConfigError(f"tensor {name} is in two files of {folder}")
                view = file.get_slice(name)
                self._files[name] = file
                self.shapes[name] = tuple(view.get_shape())
                self.dtypes[name] = view.get_dtype()

    def tensor(self, name: str) -> np.ndarray:
        """Returns one tensor, read from its file."""
        return self._files[name].get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns some rows of a tensor; `stop` may be larger than their number."""
        return self._files[name].get_slice(name)[start : min(stop, self.shapes[name][0])]


def _open(path: Path):
    safetensors = import_safetensors()
    try:
        return safetensors.safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise ConfigError(f"{path.parent / INDEX} names {path.name}, which is not there") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file: {error}") from None


def import_safetensors():
    """Returns the module `safetensors`; raises `ConfigError` without it."""
    return import_extra("safetensors", "weights need the package safetensors", "experiments")


def _files_of(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise ConfigError(f"{folder} holds no {SINGLE} and no {INDEX}{_other_weights(folder)}")
    weight_map: Any = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and all(isinstance(x, str) for x in weight_map.values())
    names = sorted(set(weight_map.values())) if is_map else []
    if not names or any(Path(name).name != name for name in names):
        raise ConfigError(f"{index} has no weight_map from tensors to files beside it")
    return [folder / name for name in names]


def _other_weights(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    return f"; {', '.join(found)} are of another format" if found else ""


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
      ConfigError: The file is missing, or holds no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no JSON object")
    return found


_BLOCK = re.compile(r"^(.*\.)(\d+)(\..*)$")


def listed(names: Iterable[str]) -> str:
    """Returns all names as text, with names that differ in the block's number alone as one.

    `model.layers.{0-2,5}.mlp.up_proj.weight` stands for four names.
    """
    groups: dict[tuple[str, str] | str, list[int]] = {}
    for name in names:
        match = _BLOCK.match(name)
        key = (match[1], match[3]) if match else name
        groups.setdefault(key, []).append(int(match[2]) if match else 0)
    return ", ".join(
        key if isinstance(key, str) else f"{key[0]}{_numbers(sorted(numbers))}{key[1]}"
        for key, numbers in groups.items()
    )


def _numbers(numbers: list[int]) -> str:
    """Returns ascending numbers as text: `5`, or `{0-2,5}`."""
    if len(numbers) == 1:
        return str(numbers[0])
    # Consecutive numbers have equal differences to their positions.
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return "{" + ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ends) + "}"


# Readers of the format ask which library's layout of tensors it is; NumPy's is PyTorch's.
_METADATA = {"format": "pt"}


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, largest_bytes: int
) -> str:
    """Writes tensors in their order; returns a summary for people.

    Args:
      folder: An existing folder without weights.
      tensors: Names and contiguous arrays; the tensors of one file are in memory at a time.
      largest_bytes: The most bytes of a file; a larger tensor has a file of its own.

    Raises:
      OSError: The files cannot be written, such as on a full disk.
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
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, folder / str(index), metadata=_METADATA)
    except SafetensorError as error:  # the package's form of an OSError
        raise OSError(str(error)) from None
    (folder / str(index)).chmod(0o644)  # the package lets only the owner read a file
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
