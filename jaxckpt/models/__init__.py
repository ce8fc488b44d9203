"""The reference model: a decoder-only Flax Transformer whose shapes are Qwen3's.

`TransformerConfig` needs no JAX; the rest is loaded when it is first used.
"""

import importlib

from jaxckpt.models.config import TransformerConfig

_LAZY = {
    "Transformer": "jaxckpt.models.transformer",
    "causal_attention": "jaxckpt.models.attention",
    "next_token_loss": "jaxckpt.models.loss",
    "resolve": "jaxckpt.models.device_choice",
}

__all__ = ["Transformer", "TransformerConfig", "causal_attention", "next_token_loss", "resolve"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxckpt.models' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
