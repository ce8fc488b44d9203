"""The plain linear cross entropy: all logits at once, with every derivative.

It is the reference for `linear_cross_entropy`, and supports forward mode. Its memory grows with
tokens times vocabulary.
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
    """Computes the same loss as `linear_cross_entropy`, by Optax, from one array of all logits.

    Args:
      x: Hidden states `[..., S, D]`, float16, bfloat16, float32 or float64.
      w: The head's weights, floating: `[D, V]`, or `[V, D]` with `layout="VD"`.
      targets: Token ids `[..., S]`, any integer dtype.
      layout: The axes of `w`, `"DV"` or `"VD"`.
      ignore_index: A target that is not counted, such as padding.
      z_loss: The weight of the squared log-partition function, a Python number.
      reduction: `"mean"` over the counted tokens (0 if no token is counted) or `"sum"`.
      return_count: Whether the number of counted tokens, an int32 scalar, is returned as well.

    Returns:
      The loss in nats, a float32 scalar (float64 if `x` is), or `(loss, count)`.

    Raises:
      ValueError: Shapes, dtypes or options do not match.

    Example:
      >>> import jax.numpy as jnp, jaxckpt
      >>> x, w = jnp.ones([2, 8, 4]), jnp.zeros([4, 16])
      >>> loss = jaxckpt.losses.plain_linear_cross_entropy(x, w, jnp.zeros([2, 8], int))
      >>> print(f"{loss:.4f}")  # log 16
      2.7726
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
    # A product rather than `where`, so that an id that does not exist makes gradients NaN as well.
    losses *= jnp.where(counted, jnp.where(known, 1, jnp.nan), 0)
    count = counted.sum(dtype=jnp.int32)
    loss = losses.sum()
    if reduction == "mean":
        loss /= jnp.maximum(count, 1).astype(loss.dtype)
    return (loss, count) if return_count else loss
