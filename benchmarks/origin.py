"""Where a number comes from: the command, the commit, versions and the device."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jaxckpt", "jax", "jaxlib", "flax", "libtpu")
ROOT = Path(__file__).parent.parent


def origin(command: str) -> dict[str, Any]:
    """Returns the command, the commit ("unknown" outside a checkout), versions and the device."""
    return {
        "command": command,
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "backend": jax.default_backend(),
        "device": device(),
    }


def device() -> str:
    """Returns the first device as text, such as `"cpu (x86_64)"` or `"gpu (NVIDIA H200)"`."""
    first = jax.devices()[0]
    kind = platform.machine() if first.platform == "cpu" else first.device_kind
    return f"{first.platform} ({kind})"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
