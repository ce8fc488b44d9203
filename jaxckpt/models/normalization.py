"""RMS normalization, alone or followed by rotary positions, with a backward pass of its own.

Shapes: B batch, S sequence, H heads, N size of the last axis.

Memory traffic, not arithmetic, bounds these functions. Automatic differentiation would take many
passes over memory, with float32 residuals between them. Here the forward pass is one pass after a
row's sum of squares, and its residuals are its inputs. The backward pass is three passes: both row
sums at once, the gradient of the input, the gradient of the scale. Everything is computed in
float32 and rounded once.

Rotary positions turn component i with i + N/2, so a row is handled as two halves; without positions
as one part. So only outputs are concatenated.

Limits: only reverse mode, like every attention kernel. The rotary table gets no gradient.
"""

import functools
from collections.abc import Iterable
from typing import cast

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x, scale, eps: float):
    """Returns `x / rms(x) * scale` over the last axis, in the dtype of `x` (Zhang, Sennrich 2019).

    Args:
      x: `[..., N]`, any floating dtype.
      scale: `[N]`.
      eps: Added to the mean square.
    """
    return _normalize([x], [scale], eps)[0].astype(x.dtype)


def _rms_norm_forward(x, scale, eps):
    return rms_norm(x, scale, eps), (x, scale)


def _rms_norm_backward(eps, residuals, grad):
    x, scale = residuals
    (grad_x,), (grad_scale,) = _normalize_backward([x], [scale], [grad], eps)
    return grad_x.astype(x.dtype), grad_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def rms_norm_rotate(x_BSHN, scale_N, rotary, eps: float):
    """Returns `rotate(rms_norm(x, scale), rotary)`, rounded once.

    Args:
      x_BSHN: Queries or keys.
      scale_N: The scale `[N]`, shared by the heads.
      rotary: Cosines and sines `[2, S, N/2]`.
      eps: Added to the mean square.
    """
    normed = _normalize(_halves(x_BSHN), _halves(scale_N), eps)
    return jnp.concatenate(turn(*normed, rotary=rotary), axis=-1).astype(x_BSHN.dtype)


def _rms_norm_rotate_forward(x_BSHN, scale_N, rotary, eps):
    return rms_norm_rotate(x_BSHN, scale_N, rotary, eps), (x_BSHN, scale_N, rotary)


def _rms_norm_rotate_backward(eps, residuals, grad_BSHN):
    x_BSHN, scale_N, rotary = residuals
    grads = turn(*_floats(_halves(grad_BSHN)), rotary=rotary, back=True)
    halves = _halves(x_BSHN), _halves(scale_N)
    grads_x, grads_scale = _normalize_backward(*halves, grads, eps)
    join = functools.partial(jnp.concatenate, axis=-1)
    return join(grads_x).astype(x_BSHN.dtype), join(grads_scale).astype(scale_N.dtype), None


rms_norm_rotate.defvjp(_rms_norm_rotate_forward, _rms_norm_rotate_backward)


def rotate(x_BSHN, rotary):
    """Returns `x_BSHN` turned by its positions; component i is paired with i + N/2 (Qwen3).

    Args:
      x_BSHN: Queries or keys.
      rotary: Cosines and sines `[2, S, N/2]`; they get no gradient.
    """
    # The table is no parameter; without this its gradient would be computed and summed over blocks.
    rotary = jax.lax.stop_gradient(rotary)
    turned = turn(*_floats(_halves(x_BSHN)), rotary=rotary)
    return jnp.concatenate(turned, axis=-1).astype(x_BSHN.dtype)


def turn(first_BSHM, second_BSHM, rotary, *, back: bool = False):
    """Returns pairs of components turned by their positions' angles, or turned back.

    Args:
      first_BSHM: The components `0..N/2`, M = N/2 of them.
      second_BSHM: The components `N/2..N`.
      rotary: Cosines and sines `[2, S, N/2]`.
      back: Whether the angles are negative, which is the transpose.
    """
    cos_S1M, sin_S1M = rotary[:, :, None, :]
    if back:
        sin_S1M = -sin_S1M
    return [
        first_BSHM * cos_S1M - second_BSHM * sin_S1M,
        second_BSHM * cos_S1M + first_BSHM * sin_S1M,
    ]


def _halves(x):
    return jnp.split(x, 2, axis=-1)


def _floats(parts):
    """Returns the parts in float32; float64 parts stay float64."""
    return [part.astype(jnp.promote_types(part.dtype, jnp.float32)) for part in parts]


def _row_sums(terms: Iterable[jax.Array]) -> jax.Array:
    total = cast("jax.Array", sum(terms))
    return total.sum(-1, keepdims=True)


def _normalize(parts, scales, eps: float):
    """Returns the normalized and scaled parts of rows, in float32."""
    parts, scales = _floats(parts), _floats(scales)
    inverse = _inverse_rms(parts, _row_sums(part * part for part in parts), eps)
    # The order of the products is Qwen3's.
    return [part * inverse * scale for part, scale in zip(parts, scales, strict=True)]


def _normalize_backward(parts, scales, grads, eps: float):
    """Returns the gradients of parts and scales, in float32.

    With y = x r s and r = 1 / rms(x): dx = r (s dy - x r^2 mean(x s dy)), ds = sum of x r dy.
    """
    parts, scales, grads = _floats(parts), _floats(scales), _floats(grads)
    triples = list(zip(parts, scales, grads, strict=True))
    square = _row_sums(part * part for part in parts)
    product = _row_sums(part * scale * grad for part, scale, grad in triples)
    inverse = _inverse_rms(parts, square, eps)
    slope = inverse * inverse * product / _width(parts)
    of_parts = [inverse * (scale * grad - part * slope) for part, scale, grad in triples]
    rows = tuple(range(parts[0].ndim - 1))
    of_scales = [(part * inverse * grad).sum(rows) for part, _, grad in triples]
    return of_parts, of_scales


def _inverse_rms(parts, square, eps: float):
    return jax.lax.rsqrt(square / _width(parts) + eps)


def _width(parts) -> int:
    return sum(part.shape[-1] for part in parts)
