"""Files of text: the standard library's sources, a file, a folder or a glob.

A file's first 8 KiB tell whether it is text, so a huge binary in a folder costs one short read. The
first lines tell JSON Lines from other text.

A link to a folder is followed. A folder that was read already, such as a parent of the link, is
left out and counted.
"""

import dataclasses
import fnmatch
import glob
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxckpt.plans.errors import UserError, nearest

_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
)
# Written when a Python is built, with the builder's own paths: another text on every machine.
_BUILD_RECORDS = ("_sysconfigdata_", "config-")
_SNIFFED_BYTES = 8192
_LONGEST_LINE = 1 << 26  # bytes of a line, in files that may be JSON Lines under another name
_TOKEN_SUFFIXES = (".npy", ".bin")
_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
_NPY = b"\x93NUMPY"
UTF8_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {b"\xff\xfe": "UTF-16 or UTF-32", b"\xfe\xff": "UTF-16", b"\0\0\xfe\xff": "UTF-32"}
_JSON_ARRAY = re.compile(rb'\s*\[\s*\{\s*"(text|tokens)"\s*:')
_DOCUMENT = re.compile(rb'\s*\{[ \t]*"(text|tokens)"[ \t]*:')  # broken or not


class DataError(UserError, ValueError):
    """Data that cannot be trained on: one line with what is valid and the nearest guess."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFile:
    """A file of text.

    Attributes:
      name: The path below the given folder, with slashes.
      path: The path that opens the file.
      is_json_lines: Whether each line is a JSON object.
      stamp: The size in bytes and the time of the last change, when the file was found.
    """

    name: str
    path: Path
    is_json_lines: bool = False
    stamp: tuple[int, int] = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "stamp", self._stamp())

    def check_unchanged(self):
        """Raises `DataError` if the file was written to since it was found."""
        if self._stamp() != self.stamp:
            raise DataError(f"{self.name} changed while it was read")

    def _stamp(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns

    def chunks(self) -> Iterator[bytes]:
        """Yields the content in parts that are small enough to hold in memory."""
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                yield chunk


def standard_library() -> list[TextFile]:
    """Returns the standard library's own sources, in sorted order.

    Tests, installed packages, caches and the records of the machine's build are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _walk(root, lambda name: name in _LEFT_OUT or name.startswith(_BUILD_RECORDS))
    sources = [path for path in files if path is not None and path.suffix == ".py"]
    return [TextFile(name=name, path=path) for name, path in _by_name(sources, root)]


def token_format(path: Path) -> str | None:
    """Returns `"npy"` or `"bin"` for a file of tokens, None for any other.

    A NumPy file is known by its first bytes, whatever its name; bare numbers are known by their
    name. Raises `DataError` if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            is_npy = file.read(len(_NPY)) == _NPY
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from None
    suffix = path.suffix.lower()
    return "npy" if is_npy else suffix[1:] if suffix in _TOKEN_SUFFIXES else None


def find_files(where: str) -> tuple[list[Path], Path, int]:
    """Returns the files that `where` names, the folder of their names, and how many are left out.

    Hidden files, pipes and other special files, and links to files that are found already are left
    out. A hidden folder counts as one file.

    Args:
      where: A file, a folder (searched with all folders below) or a glob.

    Raises:
      DataError: There is no such file or folder, or a folder cannot be listed.
    """
    if not where:
        raise DataError("--data is empty; leave it out for the standard library's sources")
    try:
        path = Path(where).expanduser()
        if path.is_file():
            return [path], path.parent, 0
        if path.is_dir():
            found = list(_walk(path, lambda name: name.startswith(".")))
            files = [file for file in found if file is not None]
            return files, path, len(found) - len(files)
        if glob.has_magic(where):
            return _match(str(path))
        missing, names = _first_missing(path)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or where!r}: {error.strerror}") from None
    except RuntimeError as error:  # no such user
        raise DataError(f"--data {where!r}: {error}") from None
    raise DataError(
        f"--data {where!r}: no such file or folder{nearest(missing.name, names)}; valid: a text "
        "file, a folder, a quoted glob, or a .npy or .bin token file"
    )


def text_files(paths: list[Path], base: Path) -> tuple[list[TextFile], int]:
    """Returns the files of text in sorted order, and how many are empty, binary or of tokens.

    Raises:
      DataError: A file cannot be read, or its text has another encoding or form.
    """
    named = _by_name(paths, base)
    try:
        found = [_text_file(name, path) for name, path in named]
    except OSError as error:
        raise DataError(f"cannot read {error.filename!r}: {error.strerror}") from None
    texts = [file for file in found if file is not None]
    return texts, len(found) - len(texts)


def _text_file(name: str, path: Path) -> TextFile | None:
    if path.suffix.lower() in _TOKEN_SUFFIXES:
        return None
    with path.open("rb") as file:
        head = file.read(_SNIFFED_BYTES)
        for mark, encoding in _OTHER_BOMS.items():
            if head.startswith(mark):
                raise DataError(
                    f"{name} begins with the byte order mark of {encoding}; text is read as UTF-8"
                )
        if not head or b"\0" in head:
            return None
        head = head.removeprefix(UTF8_BOM)
        if _JSON_ARRAY.match(head):
            raise DataError(
                f"{name} is one JSON array of documents; --pack reads JSON Lines, a document a "
                "line, as `jq -c .[]` writes them"
            )
        is_json_lines = path.suffix.lower() in _JSON_LINES_SUFFIXES or bool(_DOCUMENT.match(head))
        if not is_json_lines and head.lstrip().startswith(b"{"):
            file.seek(0)
            is_json_lines = _begins_with_objects(file)
        return TextFile(name=name, path=path, is_json_lines=is_json_lines)


def _begins_with_objects(file: BinaryIO) -> bool:
    """Returns whether the first line of a file is a document, or its first two are JSON objects.

    A file of a single JSON object is not JSON Lines.
    """
    seen = 0
    while (line := file.readline(_LONGEST_LINE)) and seen < 2:
        if not line.strip():
            continue
        try:
            value = json.loads(line.removeprefix(UTF8_BOM))
        except (ValueError, RecursionError):
            return False
        if not isinstance(value, dict):
            return False
        if "text" in value or "tokens" in value:
            return True
        seen += 1
    return seen == 2


def _walk(root: Path, is_left_out) -> Iterator[Path | None]:
    """Yields every file below `root`; None in place of each file or folder that is left out.

    Links to folders come last, so that a file below `root` has the name of its own folder. A link
    to a folder above `root` is left out, because it would add files outside of `root`.
    """

    def refuse(error: OSError):
        raise error

    seen, waiting = {_identity(parent) for parent in root.resolve().parents}, [str(root)]
    for top in waiting:
        links = []
        for folder, folders, files in os.walk(top, onerror=refuse):
            if _identity(folder) in seen:
                folders.clear()
                yield None
                continue
            seen.add(_identity(folder))
            yield from (None for name in folders + files if is_left_out(name))
            folders[:] = sorted(name for name in folders if not is_left_out(name))
            paths = (Path(folder, name) for name in files if not is_left_out(name))
            yield from (path if path.is_file() else None for path in paths)
            links += [place for name in folders if os.path.islink(place := f"{folder}/{name}")]
        waiting += links  # the loop goes on with them


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _by_name(paths: list[Path], base: Path) -> list[tuple[str, Path]]:
    return sorted((path.relative_to(base).as_posix(), path) for path in paths)


def _match(pattern: str) -> tuple[list[Path], Path, int]:
    """Returns a glob's files, the folder that they have in common, and how many are left out.

    The hash does not depend on where that folder is. A single match has the name that it would
    have without the glob.
    """
    found = list(_matches(pattern))
    # Links may bring a file twice; the shortest name is kept.
    named = sorted((path for path in found if path), key=lambda path: (len(path.parts), path))
    files = list({os.path.realpath(path): path for path in reversed(named)}.values())
    if not files:
        raise DataError(
            f"--data {pattern!r} matches no file; '**/' goes through folders, as in 'src/**/*.py'"
        )
    base = Path(os.path.commonpath([path.parent for path in files]))
    return files, base, len(found) - len(files)


def _matches(pattern: str) -> Iterator[Path | None]:
    """Yields the files that match; None for each file or folder that is left out."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from filter(Path.is_file, map(Path, glob.glob(pattern)))
        return
    # `glob` would follow a cycle of links until the path is too long.
    first = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    base, wanted = Path(*parts[:first]), parts[first:]
    is_hidden = lambda name: name.startswith(".")
    may_be_hidden = any(map(is_hidden, wanted))
    for path in _walk(base, lambda name: is_hidden(name) and not may_be_hidden):
        if path is None or _fits(path.parts[first:], wanted):
            yield path


def _fits(parts: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        starts = range(len(parts) + 1) if wanted[1:] else (len(parts),)
        return any(_fits(parts[start:], wanted[1:]) for start in starts)
    if not parts or (parts[0].startswith(".") and not wanted[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


def _first_missing(path: Path) -> tuple[Path, list[str]]:
    """Returns the first part of a path that does not exist, and the names beside it."""
    while not path.parent.exists():
        path = path.parent
    return path, os.listdir(path.parent) if path.parent.is_dir() else []
