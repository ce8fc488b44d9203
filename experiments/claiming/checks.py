"""Checks that run something small: gradients under dropout, parameter counts."""

import dataclasses
from typing import Any

import jax
import numpy as np

from experiments.claiming.cases import QWEN, SMALL_CHIP, plan_case
from experiments.training.step import init_state, resolve_model
from jaxckpt.models import Transformer, TransformerConfig, next_token_loss

SEGMENTS = "uniform:4"


def run() -> dict[str, Any]:
    """Returns the numbers of every check."""
    config, _ = resolve_model(plan_case(QWEN, SMALL_CHIP, "full").config)
    params = jax.eval_shape(lambda: init_state(config)).params
    return {
        "dropout_difference": _dropout_difference(),
        "dropout_off_difference": _dropout_difference(other_seed=True),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),  # of Qwen3-0.6B
    }


def _dropout_difference(other_seed: bool = False) -> float:
    """Returns how far gradients under segments are from those of `none`, with dropout.

    The largest difference relative to a leaf's largest value. With another seed on one side the
    dropout masks differ, which shows that dropout is on.
    """
    sizes = TransformerConfig(num_blocks=8, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8)
    options: dict[str, Any] = {"dropout": 0.3, "dtype": "f32", "attention": "plain"}
    model = dataclasses.replace(sizes, d_ff=32, **options)
    none = _gradients(model, "none")
    segments = _gradients(model, SEGMENTS, seed=int(other_seed))
    pairs = zip(jax.tree.leaves(none), jax.tree.leaves(segments), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def _gradients(config: TransformerConfig, plan: str, seed: int = 0):
    model = Transformer(config, remat=plan)
    tokens = jax.random.randint(jax.random.key(3), (2, 17), 0, 256)
    params = model.init(jax.random.key(0), tokens[:, :-1])["params"]
    rest = {"deterministic": False, "rngs": {"dropout": jax.random.key(seed)}}

    def loss(params):
        x = model.apply({"params": params}, tokens[:, :-1], method="features", **rest)
        return next_token_loss(x, params, tokens[:, 1:], config)

    return jax.device_get(jax.jit(jax.grad(loss))(params))
