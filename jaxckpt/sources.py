"""Which source lines to show: the user's or the model's own, not a library's. No JAX import.

A traceback's frame is machinery if it is in an installed package, or in a part of jaxckpt that
calls users' functions; a reader wants to see the line that called it. `jaxckpt/models` counts as a
user's model.
"""

from pathlib import Path

_INSTALLED = "/site-packages/"
_OURS = "/jaxckpt/"
_MACHINERY = ("transforms/", "costs/", "compiled/", "memory/", "planner/", "linen/", "nnx/")
_STANDARD = ("functools.py", "contextlib.py")
_ROOT = Path(__file__).parents[1]


def is_machinery(path: str) -> bool:
    """Whether a source file is a library's, or a part of jaxckpt that calls users' functions."""
    path = path.replace("\\", "/")
    if path.startswith("<") or path.rpartition("/")[2] in _STANDARD:
        return True
    _, ours, inside = path.rpartition(_OURS)
    if ours and _INSTALLED not in inside:  # not an environment inside a checkout
        return inside.startswith(_MACHINERY)
    return _INSTALLED in path


def shown(source: str) -> str:
    """Returns `file.py:line` relative to the working folder; "" if the file is missing.

    A program from a compile cache names the files of the checkout that compiled it. A file in the
    same place of this checkout is taken instead.

    Args:
      source: `file.py:line`; a relative path is not changed.
    """
    name, _, line = source.rpartition(":")
    path, here = Path(name), Path.cwd()
    if not path.is_absolute():
        return source
    if path.is_relative_to(here) and path.is_file():
        return f"{path.relative_to(here)}:{line}"
    for start in range(1, len(path.parts) - 1):
        inside = Path(*path.parts[start:])
        if any((folder / inside).is_file() for folder in (here, _ROOT)):
            return f"{inside}:{line}"
    return source if path.is_file() else ""
