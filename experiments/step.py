"""One training step: model, loss, gradients and optimizer as a pure function of the state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.config import OptimizerConfig, TrainConfig
from jaxckpt.models import Transformer, next_token_loss


class TrainState(NamedTuple):
    """What a step turns into its successor; donated to it.

    Attributes:
      step: Steps done, an int32 scalar; with the seed it gives the dropout key.
      params: The model's parameters, float32.
      optimizer: Optax's state.
    """

    step: jax.Array
    params: dict
    optimizer: optax.OptState


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with clipping and a warm-up, cosine schedule over `steps` steps."""
    warmup = min(config.warmup_steps, steps - 1)
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=config.learning_rate / 10,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
        ),
    )


def init_state(config: TrainConfig) -> TrainState:
    """Returns the state before the first step; abstract under `jax.eval_shape`."""
    tokens_BS = jnp.zeros([1, config.seq_len], jnp.int32)
    # Parameters do not depend on the plan, so the cheapest one to trace makes them.
    params = Transformer(config.model, remat="none").init(jax.random.key(config.seed), tokens_BS)
    params = params["params"]
    optimizer = make_optimizer(config.optimizer, config.steps).init(params)
    return TrainState(step=jnp.zeros([], jnp.int32), params=params, optimizer=optimizer)


def make_train_step(config: TrainConfig):
    """Returns `train_step(state, tokens) -> (state, metrics)`, to be jitted with `state` donated.

    `tokens` is `[batch_size, seq_len + 1]` integers: inputs and, shifted by one, targets. The
    metrics are scalars: `loss` in nats a token and `gradient_norm` before clipping.

    Raises (when traced):
      PlanError: The plan names what the blocks do not have.
    """
    model = Transformer(config.model, remat=config.plan, unroll=config.unroll)
    optimizer = make_optimizer(config.optimizer, config.steps)

    def loss_fn(params, tokens, key):
        logits_BSV = model.apply(
            {"params": params}, tokens[:, :-1], deterministic=False, rngs={"dropout": key}
        )
        return next_token_loss(logits_BSV, tokens[:, 1:])

    def train_step(state: TrainState, tokens):
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        loss, gradients = jax.value_and_grad(loss_fn)(state.params, tokens, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            optimizer=optimizer_state,
        )
        return state, {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}

    return train_step


def make_validation_step(config: TrainConfig):
    """Returns `validation_step(params, tokens) -> loss` in nats a token, without dropout."""
    model = Transformer(config.model, remat="none")

    def validation_step(params, tokens):
        return next_token_loss(model.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:])

    return validation_step


def _is_matrix(params):
    """Returns which parameters decay: kernels and embeddings, not the norms' scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not str(path[-1]).endswith("['scale']"), params
    )
