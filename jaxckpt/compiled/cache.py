"""Reports kept on disk, so that a step is compiled for a target once. Only `here` imports JAX.

The folder is `$JAXCKPT_CACHE`, or `jaxckpt` in the user's cache folder; deleting it is always
safe. A report's name is a digest of everything that it depends on: the program or the sources that
build it, the target or this process's devices, installed versions, the compilers' settings. In
doubt something is part of the name: making a report twice costs time, but a report of another
program would be wrong. Files appear whole, so processes may share the folder. A file that cannot be
read is replaced.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import sys
import uuid
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxckpt.compiled.report import MemoryReport
from jaxckpt.targets.present import usable_bytes
from jaxckpt.targets.target import LOCAL

# Words in the names of environment variables that compilers, drivers and JAX read.
_SETTING = re.compile(r"JAX(?!CKPT)|XLA|TPU|CU(DA|DNN|BLAS)|NVIDIA|NCCL|^TF_|TRITON|LLVM|MLIR|ROCM")
_IMPORT = re.compile(rb"^\s*(?:from\s+([\w.]+)\s+import\b|import\s+([\w., ]+))", re.MULTILINE)
_INSTALLED = {"site-packages", "dist-packages"}  # packages in these folders have a version


def folder() -> Path | None:
    """Returns the folder of reports, which may not exist yet; None if there is no home folder."""
    own = os.environ.get("JAXCKPT_CACHE")
    found = Path(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "jaxckpt"))
    try:
        return found.expanduser()
    except RuntimeError:
        return None


def key(*, environment: Mapping[str, str] | None = None, **parts: Any) -> str:
    """Returns the name of a report that depends on `parts`, installed versions and settings.

    `parts` are JSON values; settings are of the compiling process's environment, by default this
    process's.
    """
    every = parts | {"versions": versions(), "settings": settings(environment or os.environ)}
    return hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()


def here() -> dict[str, Any]:
    """Returns JSON values for `key`, which results of this process's own backend depend on.

    These are its devices, the usable bytes of one device, and every value of `jax.config`.
    """
    import jax

    devices = jax.devices()
    return {
        "devices": [device.device_kind for device in devices],
        "platform": [devices[0].platform, devices[0].client.platform_version],
        "usable_bytes": usable_bytes(LOCAL),
        # Read by attribute: `values` misses a context such as `jax.enable_x64`, which holds for
        # this thread alone.
        "config": {name: str(getattr(jax.config, name, None)) for name in jax.config.values},
    }


def load(name: str) -> MemoryReport | None:
    """Returns a kept report; None if the file is missing or incomplete."""
    try:
        return MemoryReport.from_json(load_json(name))
    except (KeyError, TypeError, AttributeError):
        return None


def store(name: str, report: MemoryReport):
    """Keeps a report; does nothing if the folder cannot be written."""
    store_json(name, report.as_json())


def load_json(name: str) -> Any:
    """Returns kept JSON values; None if the file is missing or incomplete."""
    path = _path(name)
    if path is None:
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def store_json(name: str, values: Any):
    """Keeps JSON values; does nothing if the folder cannot be written."""
    path = _path(name)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(values))


def write_whole(path: Path, content: str | bytes):
    """Writes a file so that readers find the old content or the new, never a part.

    Text becomes UTF-8. Raises `OSError`, and leaves no part of the file, if it cannot be written.
    """
    part = path.absolute().with_name(f".part-{uuid.uuid4().hex}")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            part.unlink()
        raise


def _path(name: str) -> Path | None:
    base = folder()
    return None if base is None else base / "reports" / f"{name}.json"


@functools.cache  # loaded packages keep their versions, whatever is installed meanwhile
def versions() -> dict[str, str]:
    """Returns the versions of Python and of every installed distribution."""
    found = {one.name: one.version for one in metadata.distributions()}
    return found | {"python": ".".join(map(str, sys.version_info[:3]))}


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of an environment that compilers, drivers and JAX read."""
    return {name: value for name, value in environment.items() if _SETTING.search(name)}


def digest_of_sources(packages: Iterable[str]) -> str:
    """Returns a digest of packages and of all packages without a version that they import.

    Nothing is imported but parents of dotted names. An import from another top-level package adds
    all its files. An import from the package's own top level adds the package at its depth: a file
    of `jaxckpt.memory` that imports `jaxckpt.plans.plan` adds `jaxckpt.plans`.

    Args:
      packages: Importable names, such as `"jaxckpt"` or `"jaxckpt.memory"`.

    Raises:
      ModuleNotFoundError: A package is missing.
    """
    found, asked = {}, set(packages)
    todo, seen = list(asked), set()
    while todo:
        package = todo.pop()
        if package in seen:
            continue
        seen.add(package)
        roots = _roots(package)
        if package in asked and not roots:
            raise ModuleNotFoundError(f"no module named {package!r}", name=package)
        for root in roots:
            if package not in asked and not _INSTALLED.isdisjoint(root.parts):
                continue
            for path in root.rglob("*.py") if root.is_dir() else [root]:
                digest, imported = _read(path, path.stat().st_mtime_ns)
                found[f"{package}/{path.relative_to(root)}"] = digest
                for module in imported:
                    parts = module.split(".")
                    is_own = parts[0] == package.partition(".")[0]
                    todo.append(".".join(parts[: package.count(".") + 1 if is_own else 1]))
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


@functools.cache
def _read(path: Path, mtime_ns: int) -> tuple[str, frozenset[str]]:
    """Returns a file's digest and the names of the modules that it imports."""
    text = path.read_bytes()
    names = (line[0] or line[1] for line in _IMPORT.findall(text))
    modules = (one.split()[0] for line in names for one in line.decode().split(",") if one.split())
    absolute = (one for one in modules if not one.startswith("."))
    return hashlib.sha256(text).hexdigest(), frozenset(absolute)


def _roots(package: str) -> set[Path]:
    """Returns the folders of a package, or the file of a module; empty if it has no files."""
    if package.partition(".")[0] in sys.stdlib_module_names:
        return set()
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # the parent is no package, or the module is `__main__`
        return set()
    if spec is None:
        return set()
    # A path may name one folder twice, such as "" and the working folder.
    found = spec.submodule_search_locations or [spec.origin or ""]
    return {Path(one).resolve() for one in found if one and Path(one).exists()}
