"""Reports kept on disk, so that a step is compiled for a target once. No JAX import, but in `here`.

The folder is `$JAXCKPT_CACHE`, or `jaxckpt` in the user's cache folder; deleting it is always
safe. A report's name is a digest of all that it depends on: the program or the sources that build
it, the target or this process's devices, what is installed, the compilers' settings. Where it is
hard to tell whether something matters, it is in the name: a report that is made twice costs time,
one that is another program's is wrong. Files appear whole, so processes may share the folder, and
one that cannot be read is measured again.
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
_INSTALLED = {"site-packages", "dist-packages"}  # what lies in these has a version


def folder() -> Path | None:
    """Returns where reports are kept; it need not exist. None where there is no home folder."""
    own = os.environ.get("JAXCKPT_CACHE")
    found = Path(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "jaxckpt"))
    try:
        return found.expanduser()
    except RuntimeError:
        return None


def key(*, environment: Mapping[str, str] | None = None, **parts: Any) -> str:
    """Returns the name of a report that depends on `parts`, on what is installed and settings.

    Args:
      environment: Of the process that compiles; by default this one's.
      **parts: JSON values.
    """
    every = parts | {"versions": versions(), "settings": settings(environment or os.environ)}
    return hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()


def here() -> dict[str, Any]:
    """Returns what results of this process's own backend depend on, as JSON values for `key`.

    These are its devices, what a program may fill of one, and every value of `jax.config`.
    """
    import jax

    devices = jax.devices()
    return {
        "devices": [device.device_kind for device in devices],
        "platform": [devices[0].platform, devices[0].client.platform_version],
        "usable_bytes": usable_bytes(LOCAL),
        # Read one by one: a context such as `jax.enable_x64` holds for this thread alone.
        "config": {name: str(getattr(jax.config, name, None)) for name in jax.config.values},
    }


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
    path = _path(name)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(values))


def write_whole(path: Path, content: str | bytes):
    """Makes a file that is either the old one or the new one, never half of it.

    Args:
      path: The file.
      content: All of it; text becomes UTF-8.

    Raises:
      OSError: It cannot be written; nothing is left of it.
    """
    part = path.absolute().with_name(f".part-{uuid.uuid4().hex}")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to know
            part.unlink()
        raise


def _path(name: str) -> Path | None:
    base = folder()
    return None if base is None else base / "reports" / f"{name}.json"


@functools.cache  # what is loaded stays what it is, whatever is installed meanwhile
def versions() -> dict[str, str]:
    """Returns the versions of Python and of every distribution that is installed."""
    found = {one.name: one.version for one in metadata.distributions()}
    return found | {"python": ".".join(map(str, sys.version_info[:3]))}


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of an environment that compilers, drivers and JAX read."""
    return {name: value for name, value in environment.items() if _SETTING.search(name)}


def digest_of_sources(packages: Iterable[str]) -> str:
    """Returns a digest of whole packages and of all that they import and that has no version.

    Nothing is imported but parents of dotted names. Of another top-level package that a file
    imports all files count. Of the same one those of the package at the same depth do: a file of
    `jaxckpt.memory` that imports `jaxckpt.plans.plan` adds `jaxckpt.plans`.

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
                todo += {_package(module, package) for module in imported}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _package(module: str, importer: str) -> str:
    """Returns the package to take whole for a module that a file of `importer` imports."""
    head, *rest = module.split(".")
    depth = importer.count(".") if head == importer.partition(".")[0] else 0
    return ".".join([head, *rest[:depth]])


@functools.cache
def _read(path: Path, mtime_ns: int) -> tuple[str, frozenset[str]]:
    """Returns a file's digest and the modules that it imports, as they are named there."""
    text = path.read_bytes()
    names = (line[0] or line[1] for line in _IMPORT.findall(text))
    modules = (one.split()[0] for line in names for one in line.decode().split(",") if one.split())
    absolute = (one for one in modules if not one.startswith("."))
    return hashlib.sha256(text).hexdigest(), frozenset(absolute)


def _roots(package: str) -> set[Path]:
    """Returns the folders of a package, or the file of a module; none for what has no files."""
    if package.partition(".")[0] in sys.stdlib_module_names:
        return set()
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a parent that is no package; `__main__`
        return set()
    if spec is None:
        return set()
    # A path may name one folder twice ("" and the working folder, say).
    found = spec.submodule_search_locations or [spec.origin or ""]
    return {Path(one).resolve() for one in found if one and Path(one).exists()}
