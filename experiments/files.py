"""Files and folders that commands write: complete or not at all, and never over foreign files.

A file that a command writes contains `MARK`. A folder contains the file `MARK_FILE`, which a
process locks while it writes to the folder. The system releases the lock when the process ends,
also when it is killed. A file or folder without the mark is foreign, whatever its name. No JAX
import.

A killed process may leave an incomplete line in a JSON Lines file: `read` returns the complete
lines and the numbers of the others. `commit` and `versions` tell the origin of a record.
"""

import contextlib
import errno
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.config import ConfigError
from jaxckpt.compatibility import install
from jaxckpt.compiled.cache import write_whole
from jaxckpt.plans.errors import nearest

try:
    import fcntl
except ImportError:  # not every system has it
    fcntl = None

ROOT = Path(__file__).parent.parent
# The packages that decide a run's numbers.
PACKAGES = ("jaxckpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# For the metadata of a PNG and a comment of HTML: no character that either would escape.
MARK = "Written by a command of jaxckpt, which may replace it"
MARK_FILE = ".jaxckpt"
_MADE = b"It was made by that command.\n"
_LOOKED_AT_BYTES = 4096
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def check_output(path: Path, suffixes: tuple[str, ...], mark: str = MARK):
    """Raises unless a file of a known form can be written without replacing a foreign file.

    Args:
      path: The file.
      suffixes: The known endings; empty for any.
      mark: Text near the start or the end of a file that may be replaced; empty for any file.

    Raises:
      ConfigError: The ending is unknown, the folder is missing, or the file is foreign.
    """
    name = str(path)
    if suffixes and path.suffix.lower() not in suffixes:
        guess = nearest(path.suffix, suffixes) if path.suffix else ""
        raise ConfigError(
            f"{name!r} ends in {path.suffix or 'nothing'!r}{guess}; valid: {', '.join(suffixes)}"
        )
    try:
        if not path.parent.is_dir():
            raise ConfigError(f"{name!r}: there is no folder {path.parent}")
        if path.is_dir():
            raise ConfigError(f"{name!r} is a folder; name a file")
        if os.path.lexists(path) and not (path.is_file() and _has(path, mark)):
            raise ConfigError(
                f"{name!r} is there and was not written by this command; name another file, or "
                "move it away"
            )
        if not os.access(path.parent, os.W_OK):
            raise ConfigError(f"cannot write {name!r}: no permission in {path.parent}")
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot write {name!r}: {reason(error)}") from None


def _has(path: Path, mark: str) -> bool:
    """Whether a file has a mark near its start or its end; an empty file may be replaced too."""
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT_BYTES)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOOKED_AT_BYTES))
        return not start or mark.encode() in start or mark.encode() in file.read()


def write_text(path: Path, text: str):
    """Writes a complete text file or nothing; raises `ConfigError` if it cannot."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {reason(error)}") from None


@contextlib.contextmanager
def own_folder(folder: Path, command: str, record: str, *, is_new: bool = False) -> Iterator[Path]:
    """A context in which this process alone writes to a folder; yields its absolute path.

    The folder is made if it is missing. A folder that this process made, or an earlier process that
    was killed, is removed at the end if nothing was added to it.

    Args:
      folder: A folder that is absent, empty, or made by `command`.
      command: Such as `experiments.train`.
      record: The name of the file of JSON objects that the command keeps in the folder. If a folder
        has no mark, the first line of this file tells which command made it.
      is_new: Take the first free name of `folder`, `folder-2`, ... instead.

    Raises:
      ConfigError: The folder is foreign, another process is writing to it, or it cannot be made.
    """
    folder, made = folder.absolute(), []
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{str(folder)!r} is a file; name a folder")
        folder = _make(folder, is_new, made)
        before = {*os.listdir(folder)}
        if not is_own(folder, command, record) and before - {MARK_FILE}:
            raise ConfigError(
                f"{str(folder)!r} is not empty and no folder of {command}; name another one"
            )
        number = _lock(folder)
    except (OSError, ValueError) as error:
        _remove(made)
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot write to the folder {str(folder)!r}: {reason(error)}") from None
    mark = folder / MARK_FILE
    try:
        if not os.fstat(number).st_size:
            os.write(number, _line_of(command) + _MADE * (folder in made))
        elif before == {MARK_FILE} and mark.read_bytes().endswith(_MADE):
            before, made = set(), [folder]
        yield folder
    finally:
        with contextlib.suppress(OSError):  # an earlier error is the one to report
            if {*os.listdir(folder)} - {MARK_FILE} == before and MARK_FILE not in before:
                mark.unlink()
                _remove(made)
        os.close(number)


def is_own(folder: Path, command: str, record: str) -> bool:
    """Whether a command made a folder, by the folder's content."""
    with contextlib.suppress(OSError):
        if found := (folder / MARK_FILE).read_bytes():  # empty if a process was killed at its start
            return found.startswith(_line_of(command))
    with contextlib.suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
        with (folder / record).open(encoding="utf-8") as file:
            row: Any = json.loads(file.readline())
        return "jaxckpt" in row["versions"]
    return False


def _line_of(command: str) -> bytes:
    return f"{MARK}: a folder of {command}\n".encode()


def _make(folder: Path, is_new: bool, made: list[Path]) -> Path:
    """Returns the folder; every folder that is created is put at the front of `made`."""
    for parent in reversed(folder.parents):
        with contextlib.suppress(FileExistsError):  # made by another process just now
            if not parent.exists():
                parent.mkdir()
                made.insert(0, parent)
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            path.mkdir()
            made.insert(0, path)
            return path
        except FileExistsError:
            if not is_new:
                return path
    raise AssertionError


def _remove(made: list[Path]):
    with contextlib.suppress(OSError):  # another process has added something to a folder
        for path in made:
            path.rmdir()


def remove_left(folder: Path, command: str):
    """Removes a folder of `own_folder` that an ended process left.

    The folder stays if it is foreign, or if the system cannot say whether the process has ended.
    """
    with contextlib.suppress(OSError), (folder / MARK_FILE).open("rb+") as mark:
        if fcntl is not None and mark.read().startswith(_line_of(command)):
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> int:
    """Returns a file descriptor that holds the folder's lock until it is closed."""
    path = folder / MARK_FILE
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_file(number, folder)
            # The previous holder of the lock may have removed the file with the folder.
            if os.fstat(number).st_nlink:
                return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)


def _lock_file(number: int, folder: Path):
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks")
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another process is writing to {str(folder)!r}; wait for it, or name another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"warning: there are no locks on {folder}: keep other processes from writing to it",
            file=sys.stderr,
        )


def is_locked(folder: Path) -> bool:
    """Whether a process is writing to a folder that a command made."""
    try:
        with (folder / MARK_FILE).open("rb+") as mark:
            if fcntl is not None:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks
        pass
    return False


def reason(error: OSError | ValueError) -> str:
    """Returns the system's text of an error."""
    return getattr(error, "strerror", None) or str(error)


def read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns the objects of a JSON Lines file, and the numbers of its broken lines, from 1.

    Empty lines are skipped. Raises `OSError` if the file cannot be read.
    """
    rows, broken = [], []
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(number)
    return rows, broken


def _refuse(constant: str):
    """Refuses NaN and Infinity, which are not JSON, and which a browser cannot read."""
    raise ValueError(f"{constant} is not JSON")


def import_extra(module: str, why: str, extra: str) -> Any:
    """Returns a module of an extra; raises `ConfigError`, begun with `why`, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"{why}: {install(extra)}") from None


def commit() -> str:
    """Returns the checkout's commit; "unknown" outside of a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Returns the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
