"""Loss heads whose memory does not grow with tokens times vocabulary.

`jaxckpt.losses.sizes` needs no JAX; the rest is loaded when it is first used.
"""

import importlib

_LAZY = {
    "linear_cross_entropy": "jaxckpt.losses.linear",
    "plain_linear_cross_entropy": "jaxckpt.losses.plain",
}

__all__ = ["linear_cross_entropy", "plain_linear_cross_entropy"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxckpt.losses' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
