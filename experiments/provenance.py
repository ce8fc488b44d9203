"""Where a number comes from: the checkout's commit and the versions of packages. Imports no JAX."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commit() -> str:
    """Returns the checkout's commit, or "unknown" outside of one."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


# The packages that decide a run's numbers.
PACKAGES = ("jaxckpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Returns the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
