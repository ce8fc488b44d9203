"""Reports kept on disk, so that a step is compiled for a target once. No JAX import.

The folder is `$JAXCKPT_CACHE`, or `jaxckpt` in the user's cache folder; deleting it is always
safe. A report's name is a digest of all that it depends on: program or entry point, target,
versions, compiler flags. Files appear whole, so processes may share the folder, and one that cannot
be read is measured again.
"""

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxckpt.memory.report import MemoryReport

# Distributions whose version may change what is compiled or how.
_DISTRIBUTIONS = (
    *("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13"),
    *("nvidia-cudnn-cu12", "flax", "optax", "numpy"),
)
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Settings of JAX in the environment that change nothing here, or that `launch.py` sets.
_NOT_FLAGS = (
    *("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"),
    *("JAX_LOGGING_LEVEL", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"),
)


def folder() -> Path | None:
    """Returns where reports are kept; it need not exist. None where there is no home folder."""
    own = os.environ.get("JAXCKPT_CACHE")
    found = Path(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "jaxckpt"))
    try:
        return found.expanduser()
    except RuntimeError:
        return None


def key(**parts: Any) -> str:
    """Returns the name of a report that depends on `parts` (JSON values), versions and flags."""
    every = parts | {"versions": versions(), "flags": flags()}
    return hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()


def load(name: str) -> MemoryReport | None:
    """Returns a kept report; None if there is none, or none that is whole."""
    try:
        return MemoryReport.from_json(load_json(name))
    except (KeyError, TypeError, AttributeError):
        return None


def store(name: str, report: MemoryReport):
    """Keeps a report. A folder that cannot be written costs a compilation later, not this one."""
    store_json(name, report.as_json())


def load_json(name: str) -> Any:
    """Returns kept JSON values; None if there are none, or none that are whole."""
    path = _path(name)
    if path is None:
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def store_json(name: str, values: Any):
    """Keeps JSON values, as `store` does a report."""
    path, part = _path(name), None
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            part = file.name
            json.dump(values, file)
        os.replace(part, path)
    except OSError:
        if part is not None:
            Path(part).unlink(missing_ok=True)


def _path(name: str) -> Path | None:
    base = folder()
    return None if base is None else base / "reports" / f"{name}.json"


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the distributions that a report depends on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def flags() -> dict[str, str]:
    """Returns the compiler's and JAX's settings in the environment, which workers inherit."""
    is_flag = lambda name: name in _FLAGS or (name.startswith("JAX_") and name not in _NOT_FLAGS)
    return {name: value for name, value in os.environ.items() if is_flag(name)}


def digest_of_sources(packages: Iterable[str]) -> str:
    """Returns a digest of every Python file of some importable packages, without importing them.

    Raises:
      ModuleNotFoundError: There is no such package.
    """
    digest = hashlib.sha256()
    for package in sorted(set(packages)):
        for name, path in sorted(_sources(package)):
            digest.update(f"{package}/{name}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _sources(package: str) -> list[tuple[str, Path]]:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"no module named {package!r}", name=package)
    if spec.submodule_search_locations is None:
        assert spec.origin is not None, package  # a module that is no folder is a file
        path = Path(spec.origin)
        return [(path.name, path)]
    # A path may name one folder twice ("" and the working folder, say).
    roots = {Path(root).resolve() for root in spec.submodule_search_locations}
    return [(str(p.relative_to(root)), p) for root in roots for p in root.rglob("*.py")]
