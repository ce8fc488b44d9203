"""Pairs of JAX and Flax that are known not to work together, refused before either is imported.

Versions are read from the installed packages' metadata, so this costs milliseconds.
"""

import importlib.metadata
from pathlib import Path

# Up to this Flax, `flax.nnx` needs `jax.experimental.hijax.HiPrimitive`, which this JAX dropped.
_LAST_OLD_FLAX, _FIRST_NEW_JAX = (0, 12, 9), (0, 11, 1)


def check_installed():
    """Raises `ImportError`, one line with the cure, if the installed pair does not work."""
    try:
        check(jax=importlib.metadata.version("jax"), flax=importlib.metadata.version("flax"))
    except importlib.metadata.PackageNotFoundError:
        return  # a missing package says so itself when it is imported


def check(*, jax: str, flax: str):
    """Raises `ImportError` for a pair of versions that is known not to work."""
    if _numbers(flax) <= _LAST_OLD_FLAX and _numbers(jax) >= _FIRST_NEW_JAX:
        raise ImportError(
            f"flax {flax} does not work with jax {jax}; install 'flax>=0.12.10' (Python 3.12 or "
            "newer) or 'jax<0.11.1'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Returns the first three numbers of a version, without any suffix."""
    numbers = []
    for part in version.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def install(extra: str) -> str:
    """Returns the command that installs an extra, of this checkout if it is one, else the package.

    Args:
      extra: The extra's name, such as `tpu`.
    """
    root = Path(__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        return f"pip install 'jaxckpt[{extra}]'"
    return f"pip install -e '{'.' if root == Path.cwd() else root}[{extra}]'"
