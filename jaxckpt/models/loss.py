"""The loss head: next-token cross entropy."""

import jax.numpy as jnp
import optax


def next_token_loss(logits_BSV, targets_BS):
    """Returns the mean cross entropy in nats a token, a float32 scalar.

    Args:
      logits_BSV: Scores of every token id at every position.
      targets_BS: The token id that follows each position.
    """
    logits_BSV = logits_BSV.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BSV, targets_BS).mean()
