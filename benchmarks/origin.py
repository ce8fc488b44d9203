"""Where a number comes from: the command, the commit, versions and the device."""

import platform
from typing import Any

import jax

from experiments.provenance import commit, versions

_PACKAGES = ("jaxckpt", "jax", "jaxlib", "flax", "libtpu")


def origin(command: str) -> dict[str, Any]:
    """Returns the command, the commit ("unknown" outside a checkout), versions and the device."""
    return {
        "command": command,
        "commit": commit(),
        "versions": versions(_PACKAGES),
        "backend": jax.default_backend(),
        "device": device(),
    }


def device() -> str:
    """Returns the first device as text, such as `"cpu (x86_64)"` or `"gpu (NVIDIA H200)"`."""
    first = jax.devices()[0]
    kind = platform.machine() if first.platform == "cpu" else first.device_kind
    return f"{first.platform} ({kind})"
