"""Files of text as bytes: the standard library's sources, a file, a folder or a glob.

A file is told from a binary by its first 8 KiB, so a huge binary in a folder costs one short read.
Text in UTF-16 holds NUL bytes and counts as binary.
"""

import glob
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from jaxckpt.plans.errors import UserError, nearest

_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
)
# Written when a Python is built, with the builder's own paths: another text on every machine.
_BUILD_RECORDS = ("_sysconfigdata_", "config-")
_SNIFFED_BYTES = 8192


class DataError(UserError, ValueError):
    """Data that cannot be trained on: one line with what is valid and the nearest guess."""


def standard_library() -> list[tuple[str, bytes]]:
    """Returns `(relative path, text)` of the standard library's own sources, in sorted order.

    Tests, installed packages, caches and the records of the machine's build are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _walk(root, lambda name: name in _LEFT_OUT or name.startswith(_BUILD_RECORDS))
    sources = [path for path in files if path is not None and path.suffix == ".py"]
    return [(name, path.read_bytes()) for name, path in _by_name(sources, root)]


def find_files(where: str) -> tuple[list[Path], Path, int]:
    """Returns the files that `where` names, the folder that names them, and how many are hidden.

    Args:
      where: A file, a folder (searched through) or a glob. A hidden folder counts as one file.

    Raises:
      DataError: Nothing there, or a folder that cannot be listed.
    """
    if not where:
        raise DataError("--data is empty; leave it out for the standard library's sources")
    path = Path(where)
    try:
        if path.is_file():
            return [path], path.parent, 0
        if path.is_dir():
            found = list(_walk(path, lambda name: name.startswith(".")))
            files = [file for file in found if file is not None]
            return files, path, len(found) - len(files)
        if glob.has_magic(where):
            return _match(where)
        missing, names = _first_missing(path)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or where!r}: {error.strerror}") from None
    raise DataError(
        f"--data {where!r}: no such file or folder{nearest(missing.name, names)}; valid: a text "
        "file, a folder, a quoted glob, or a .npy or .bin token file"
    )


def read_texts(paths: list[Path], base: Path) -> tuple[list[tuple[str, bytes]], int]:
    """Returns `(path below base, text)` in sorted order, and how many are empty or binary.

    Raises:
      DataError: A file that cannot be read.
    """
    try:
        read = [(name, _text(path)) for name, path in _by_name(paths, base)]
    except OSError as error:
        raise DataError(f"cannot read {error.filename!r}: {error.strerror}") from None
    texts = [(name, text) for name, text in read if text]
    return texts, len(read) - len(texts)


def _text(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(_SNIFFED_BYTES)
        return b"" if b"\0" in head else head + file.read()


def _walk(root: Path, is_left_out) -> Iterator[Path | None]:
    """Yields every file below `root`; None in place of each file or folder that is left out."""

    def refuse(error: OSError):
        raise error

    for folder, folders, files in os.walk(root, onerror=refuse):
        yield from (None for name in folders + files if is_left_out(name))
        folders[:] = [name for name in folders if not is_left_out(name)]
        paths = (Path(folder, name) for name in files if not is_left_out(name))
        yield from (path for path in paths if path.is_file())


def _by_name(paths: list[Path], base: Path) -> list[tuple[str, Path]]:
    return sorted((path.relative_to(base).as_posix(), path) for path in paths)


def _match(pattern: str) -> tuple[list[Path], Path, int]:
    """Returns a glob's files and the folder that they have in common.

    Names in the hash do not depend on where that folder is, and a single match is named as if it
    had been given itself.
    """
    files = [path for path in map(Path, set(glob.glob(pattern, recursive=True))) if path.is_file()]
    if not files:
        raise DataError(
            f"--data {pattern!r} matches no file; '**/' goes through folders, as in 'src/**/*.py'"
        )
    return files, Path(os.path.commonpath([path.parent for path in files])), 0


def _first_missing(path: Path) -> tuple[Path, list[str]]:
    """Returns the first part of a path that does not exist, and the names beside it."""
    while not path.parent.exists():
        path = path.parent
    return path, os.listdir(path.parent) if path.parent.is_dir() else []
