"""What cross entropy needs of each row of logits: its logsumexp and its target's logit.

As usually written that is three passes over the logits (the maximum, the sum of exponentials, the
target's logit picked by comparison), because the second needs the first's result. One reduction
does all three when partial sums are rescaled to the larger of two maxima (Milakov, Gimelshein
2018, Online normalizer calculation for softmax). It is used on NVIDIA GPUs, where a pass over the
logits costs time; a CPU's compiler does not vectorize such a reduction.
"""

import jax
import jax.numpy as jnp
from jax import lax


def row_statistics(logits, is_target):
    """Returns `(logsumexp, target's logit)` of each row, in the dtype of the logits.

    Args:
      logits: `[..., V]`, float32 or float64, finite.
      is_target: `[..., V]`, true at each row's target.
    """
    return lax.platform_dependent(logits, is_target, cuda=_one_pass, default=_plain)


def _plain(logits, is_target):
    picked = jnp.where(is_target, logits, 0).sum(axis=-1)
    return jax.nn.logsumexp(logits, axis=-1), picked


@jax.custom_jvp
def _one_pass(logits, is_target):
    lowest = jnp.finfo(logits.dtype).min  # not -inf, of which a difference is NaN
    start = [jnp.asarray(value, logits.dtype) for value in (lowest, 0, 0)]
    values = (logits, jnp.ones_like(logits), jnp.where(is_target, logits, 0))
    largest, total, picked = lax.reduce(values, tuple(start), _merge, [logits.ndim - 1])
    return largest + jnp.log(total), picked


@_one_pass.defjvp
def _one_pass_jvp(primals, tangents):
    logits, is_target = primals
    return jax.jvp(lambda logits: _plain(logits, is_target), [logits], list(tangents[:1]))


def _merge(left, right):
    """Returns the maximum, the sum of exponentials below it, and the target's logit, of both.

    One exponential a merge, which is all the arithmetic that shows.
    """
    above = left[0] - right[0]
    rescale = jnp.exp(-jnp.abs(above))
    total = jnp.where(above > 0, left[1] + right[1] * rescale, left[1] * rescale + right[1])
    return jnp.maximum(left[0], right[0]), total, left[2] + right[2]
