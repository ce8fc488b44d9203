"""What is checked by running something small here: gradients under dropout, parameter counts."""

from typing import Any

from experiments.claiming.cases import QWEN, SMALL_CHIP, plan_case
from experiments.config import TrainConfig
from jaxckpt.models.config import TransformerConfig

SEGMENTS = "uniform:4"


def run() -> dict[str, Any]:
    """Returns every check's numbers; imports JAX."""
    return {
        "dropout_difference": _dropout_difference(),
        "dropout_off_difference": _dropout_difference(other_seed=True),
        "parameters": _parameters(),
    }


def _dropout_difference(other_seed: bool = False) -> float:
    """Returns how far gradients under segments are from those of `none`, with dropout.

    The largest difference relative to a leaf's largest value. With another seed on one side the
    masks differ: a check that the dropout is there.
    """
    import jax
    import numpy as np

    sizes: dict[str, Any] = {
        "num_blocks": 8,
        "d_model": 16,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
    }
    model = TransformerConfig(**sizes, d_ff=32, dropout=0.3, dtype="f32", attention="plain")
    config = TrainConfig(model=model, batch_size=2, seq_len=16, remat="none")
    none, segments = (_gradients(config, plan) for plan in ("none", SEGMENTS))
    if other_seed:
        segments = _gradients(config, SEGMENTS, seed=1)
    pairs = zip(jax.tree.leaves(none), jax.tree.leaves(segments), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def _gradients(config: TrainConfig, plan: str, seed: int = 0):
    """Returns the gradients of one batch's loss, as NumPy arrays."""
    import jax

    from jaxckpt.models import Transformer, next_token_loss

    model = Transformer(config.model, remat=plan)
    tokens = jax.random.randint(jax.random.key(3), (2, config.seq_len + 1), 0, 256)
    params = model.init(jax.random.key(0), tokens[:, :-1])["params"]
    rest = {"deterministic": False, "rngs": {"dropout": jax.random.key(seed)}}

    def loss(params):
        x = model.apply({"params": params}, tokens[:, :-1], method="features", **rest)
        return next_token_loss(x, params, tokens[:, 1:], config.model)

    return jax.device_get(jax.jit(jax.grad(loss))(params))


def _parameters() -> int:
    """Returns the number of parameters of Qwen3-0.6B."""
    import jax

    from experiments.training.step import init_state, resolve_model

    config, _ = resolve_model(plan_case(QWEN, SMALL_CHIP, "full").config)
    params = jax.eval_shape(lambda: init_state(config)).params
    return sum(leaf.size for leaf in jax.tree.leaves(params))
