"""The optimizers: clipping, one of Optax's scalings, decay of matrices, and the learning rate."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from experiments.config import OptimizerConfig
from experiments.training.rounding import stochastically_rounded

# The root mean square of AdamW's updates, measured over many runs. A matrix that Muon has
# orthogonalized gets the same one by this factor and sqrt(the larger side), so that one learning
# rate serves both (Liu et al. 2025, Muon is scalable for LLM training, section 2.2).
_ADAMW_UPDATE = 0.2


def make_optimizer(
    config: OptimizerConfig, steps: int, *, clips: bool = True, rounds: int | None = None
) -> optax.GradientTransformation:
    """Returns the optimizer with a warm-up, cosine schedule over `steps` steps.

    The schedule is over `config.decay_steps` if they are set. Weight decay is decoupled and
    multiplied by the learning rate for every optimizer; scales of norms do not decay.

    Args:
      config: The settings of the optimizer.
      steps: Steps of the run.
      clips: Whether it clips by the global norm. The structure of the state does not depend on it.
      rounds: The seed for rounding parameters in bfloat16; None if all parameters are float32.
    """
    steps = config.decay_steps or steps
    warmup = min(config.warmup_steps, steps - 1)
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=config.learning_rate / 10,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if clips else optax.identity(),
        _SCALINGS[config.kind](*config.betas, config.moment_dtype),
        optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
        optax.scale_by_learning_rate(rate),
    )
    return optimizer if rounds is None else stochastically_rounded(optimizer, rounds)


def _adamw(beta1: float, beta2: float, dtype: str):
    return optax.scale_by_adam(b1=beta1, b2=beta2, mu_dtype=dtype)


def _adafactor(*_):
    """Returns Adafactor without momentum (Shazeer, Stern 2018).

    It keeps a row and a column for each matrix. The size of an update is relative to the size of
    the parameter, which is one block's row of a stacked parameter.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        _by_block(optax.clip_by_block_rms(1.0)),
        _by_block(optax.scale_by_param_block_rms()),
    )


def _by_block(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns a transformation without state, applied to each block of the stack by itself."""

    def update(updates: Any, state: Any, params: Any = None, **_: Any):
        def one(path, update, param):
            call = lambda update, param: transform.update(update, state, param)[0]
            is_stacked = jax.tree_util.keystr(path).startswith("['layers']")
            return (jax.vmap(call) if is_stacked else call)(update, param)

        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformation(transform.init, update)


def _lion(beta1: float, beta2: float, dtype: str):
    return optax.scale_by_lion(b1=beta1, b2=beta2, mu_dtype=dtype)


def _sgd(beta1: float, _, dtype: str):
    return optax.trace(decay=beta1, accumulator_dtype=dtype)


def _muon(beta1: float, beta2: float, dtype: str):
    """Returns Muon (Jordan 2024) for the matrices of each block, and Adam for the rest."""
    matrix = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    orthogonal = contrib.scale_by_muon(
        beta=beta1,
        weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: matrix, tree),
        mu_dtype=dtype,
    )
    resized = optax.stateless_with_tree_map(
        lambda update, _: _ADAMW_UPDATE * math.sqrt(max(jnp.shape(update)[-2:])) * update
    )
    return optax.partition(
        {"muon": optax.chain(orthogonal, resized), "adam": _adamw(beta1, beta2, dtype)},
        lambda params: jax.tree_util.tree_map_with_path(_muon_label, params),
    )


_SCALINGS = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "sgd": _sgd,
    "muon": _muon,
}


def _muon_label(path, _) -> str:
    """Returns `muon` for the kernels of the stack; embedding and head are not hidden layers."""
    name = jax.tree_util.keystr(path)
    return "muon" if name.startswith("['layers']") and name.endswith("['kernel']") else "adam"


def _is_matrix(params):
    """Returns which parameters decay: kernels and embeddings, not the norms' scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not str(path[-1]).endswith("['scale']"), params
    )
