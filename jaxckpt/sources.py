"""Source lines that mean something to a reader: the user's or the model's own. No JAX import.

Frames of a traceback are machinery where they lie in an installed package, or in those parts of
this one that call other people's functions: what called them is the line that a reader wants to
see. `jaxckpt/models` is a model like any other.
"""

from pathlib import Path

_INSTALLED = "/site-packages/"
_OURS = "/jaxckpt/"
_MACHINERY = ("transforms/", "costs/", "compiled/", "memory/", "planner/", "linen.py", "nnx.py")
_STANDARD = ("functools.py", "contextlib.py")
_ROOT = Path(__file__).parents[1]


def is_machinery(path: str) -> bool:
    """Whether a source file calls other people's functions."""
    path = path.replace("\\", "/")
    if path.startswith("<") or path.rpartition("/")[2] in _STANDARD:
        return True
    _, ours, inside = path.rpartition(_OURS)
    if ours and _INSTALLED not in inside:  # no checkout's own environment
        return inside.startswith(_MACHINERY)
    return _INSTALLED in path


def shown(source: str) -> str:
    """Returns `file.py:line` as it is found from the working folder, or "" if it is not there.

    A program read from a compile cache names the files of whoever compiled it: a file with the same
    place in this checkout stands for one in another.

    Args:
      source: `file.py:line`; a relative path is taken as it is.
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
