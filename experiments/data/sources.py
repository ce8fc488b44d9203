"""Files of text as bytes: the standard library's sources, a file, a folder or a glob."""

import glob
import sysconfig
from pathlib import Path

from jaxckpt.plans.errors import nearest

_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
)
_SNIFFED_BYTES = 8192


class DataError(ValueError):
    """Data that cannot be trained on: one line with what is valid and the nearest guess."""


def standard_library() -> list[tuple[str, bytes]]:
    """Returns `(relative path, text)` of the standard library's own sources, in sorted order.

    Tests, installed packages and caches are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    names = sorted(name for name in paths if _LEFT_OUT.isdisjoint(name.split("/")))
    return [(name, paths[name].read_bytes()) for name in names]


def text_files(where: str) -> tuple[list[tuple[str, bytes]], int]:
    """Returns `(path, text)` of the files that `where` names, sorted, and how many were skipped.

    Args:
      where: A file, a folder (searched through, hidden files left out) or a glob.

    Raises:
      DataError: Nothing there, nothing that is text, or no text in it.
    """
    path = Path(where)
    if path.is_file():
        paths, base = [path], path.parent
    elif path.is_dir():
        paths, base = _visible_files(path), path
    elif glob.has_magic(where):
        paths = sorted(Path(name) for name in glob.glob(where, recursive=True))
        paths, base = [found for found in paths if found.is_file()], Path()
        if not paths:
            raise DataError(f"--data {where!r} matches no file")
    else:
        folder = path.parent if path.parent.is_dir() else Path()
        names = [str(folder / entry.name) for entry in folder.iterdir()]
        raise DataError(
            f"--data {where!r}: no such file or folder{nearest(where, names)}; valid: a text "
            "file, a folder, a quoted glob, or a .npy or .bin token file"
        )
    texts = [(found.relative_to(base).as_posix(), _read(found)) for found in paths]
    kept = [(name, text) for name, text in texts if text and b"\0" not in text[:_SNIFFED_BYTES]]
    if not kept:
        what = "is empty or not text" if path.is_file() else "holds no text file"
        raise DataError(f"--data {where!r} {what}")
    return kept, len(texts) - len(kept)


def _visible_files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    visible = (
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return sorted(visible, key=lambda path: path.relative_to(folder).as_posix())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from None
