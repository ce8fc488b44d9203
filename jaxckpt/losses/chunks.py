"""How tokens are cut into chunks: the same few positions of every row at a time.

`[B, S, D]` is cut along S, so that a chunk is `[B, S / n, D]`. A batch that is sharded over B
stays sharded inside the chunk and every device works on each of them; chunks of the flattened
tokens would each lie on one device.

What cross entropy needs of each row of logits: its logsumexp and its target's logit.

As usually written that is three passes over the logits (the maximum, the sum of exponentials, the
target's logit picked by comparison), because the second needs the first's result. One reduction
does all three when partial sums are rescaled to the larger of two maxima (Milakov, Gimelshein
2018, Online normalizer calculation for softmax). It is used on NVIDIA GPUs, where a pass over the
logits costs time; a CPU's compiler does not vectorize such a reduction.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt.losses.sizes import chunk_positions

# Less than this is never worth cutting: the launch of a chunk's kernels would show.
_SMALL_BYTES = 64 * 2**20
_LOGIT_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
    """Chunks of `size` positions each of `length`; the last one may be smaller.

    Attributes:
      length: Positions in a row (S).
      size: Positions in a chunk; at least 1.
    """

    length: int
    size: int

    def sweep(self, step: Callable, state):
        """Returns `step(state, start, size)` folded over the chunks, whole ones in one loop.

        Args:
          step: From the state, a chunk's first position and its static size to the next state.
          state: Any pytree of arrays.
        """
        whole, rest = divmod(self.length, self.size)
        if whole == 1:
            state = step(state, 0, self.size)
        elif whole:
            starts = self.size * jnp.arange(whole, dtype=jnp.int32)
            body = lambda state, start: (step(state, start, self.size), None)
            state, _ = lax.scan(body, state, starts)
        if rest:
            state = step(state, whole * self.size, rest)
        return state


def choose_chunks(
    tokens_shape: Sequence[int], width: int, vocab_size: int, token_shards: int
) -> Chunks:
    """Returns chunks whose logits weigh, on each device, what the weights' gradient weighs.

    Both are float32, so that is D tokens a device: as many as keep the arithmetic of a chunk (in
    proportion to its tokens) above the reading and writing of the D x V sums. Nor do they weigh
    less than 64 MiB, so a small problem is one chunk. The chunks are as few as that allows, and
    then as even: the last one is smaller by less than their number.

    Args:
      tokens_shape: Rows' axes, then positions.
      width: D.
      vocab_size: V.
      token_shards: Devices that share the tokens.
    """
    *rows, length = tokens_shape
    small = _SMALL_BYTES // (_LOGIT_BYTES * vocab_size)
    tokens = token_shards * max(width, small, 1)
    size = max(tokens // max(math.prod(rows), 1), 1)
    count = max(-(-length // size), 1)
    return Chunks(length=length, size=max(-(-length // count), 1))


def given_chunks(tokens_shape: Sequence[int], chunk_tokens: int) -> Chunks:
    """Returns chunks of exactly `chunk_tokens` tokens; errors are those of `chunk_positions`."""
    return Chunks(length=tokens_shape[-1], size=chunk_positions(tokens_shape, chunk_tokens))


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
