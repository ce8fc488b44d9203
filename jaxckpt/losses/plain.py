"""The plain linear cross entropy: all logits at once, and every derivative there is.

It is the measure of `linear_cross_entropy`, and what to use for forward-mode derivatives; its
memory grows with tokens times vocabulary.
"""

import jax
import jax.numpy as jnp
import optax

from jaxckpt.losses import inputs


def plain_linear_cross_entropy(
    x,
    w,
    targets,
    *,
    layout: str = "DV",
    ignore_index: int | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    return_count: bool = False,
):
    """Returns what `linear_cross_entropy` returns, by Optax, from one array of all logits.

    Arguments and errors are those of `linear_cross_entropy`.
    """
    options = inputs.Options(
        layout=layout, ignore_index=ignore_index, z_loss=z_loss, reduction=reduction
    )
    x, w, targets = jnp.asarray(x), jnp.asarray(w), jnp.asarray(targets)
    inputs.check_arrays(x, w, targets, options)
    kernel_DV = (w if layout == "DV" else w.T).astype(x.dtype)
    logits = jnp.matmul(x, kernel_DV, preferred_element_type=inputs.accumulator_dtype(x))
    counted = inputs.counted_tokens(targets, options)
    known = inputs.in_vocabulary(targets, logits.shape[-1])
    ids = jnp.where(known, targets, 0).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
    losses += options.z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
    # A product, so that the gradients of an id that does not exist are NaN as well.
    losses *= jnp.where(counted, jnp.where(known, 1, jnp.nan), 0)
    count = counted.sum(dtype=jnp.int32)
    loss = losses.sum()
    if reduction == "mean":
        loss /= jnp.maximum(count, 1).astype(loss.dtype)
    return (loss, count) if return_count else loss
