"""How tokens are cut into chunks: the same few positions of every row at a time.

`[B, S, D]` is cut along S into chunks `[B, S / n, D]`. A batch that is sharded over B stays sharded
inside a chunk, so every device works on each chunk. A chunk of the flattened tokens would be on one
device.

`row_statistics`: cross entropy needs the logsumexp and the target's logit of each row of logits.
The usual code takes three passes over the logits: the maximum, the sum of exponentials, which needs
the maximum, and the target's logit, picked by comparison. One reduction does all three by rescaling
partial sums to the larger of two maxima (Milakov, Gimelshein 2018, Online normalizer calculation
for softmax). It is used on NVIDIA GPUs, where a pass over the logits takes time; a CPU's compiler
does not vectorize it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt.losses.sizes import chunk_positions

# Logits below this size are never cut: launching a chunk's kernels would take longer.
_SMALL_BYTES = 64 * 2**20
_LOGIT_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
    """Chunks of `size` positions out of `length`; the last chunk may be smaller.

    Attributes:
      length: The number of positions in a row (S).
      size: The number of positions in a chunk, at least 1.
    """

    length: int
    size: int

    def sweep(self, step: Callable, state):
        """Folds `step(state, start, size) -> state` over the chunks, from any pytree of arrays.

        `start` is a chunk's first position, `size` its static size. Full chunks share one loop.
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
    """Returns chunks whose logits on each device are as large as the weights' gradient.

    Both are float32, so a chunk has D tokens per device. Then its arithmetic outweighs reading and
    writing the D x V sums. Logits of a chunk are at least 64 MiB, so a small problem is one chunk.
    Chunks are as few as possible, and as even as possible: the last chunk is smaller by less than
    the number of chunks.

    Args:
      tokens_shape: The axes of rows, then the axis of positions.
      width: The width of the hidden state, D.
      vocab_size: The size of the vocabulary, V.
      token_shards: The number of devices that share the tokens.
    """
    *rows, length = tokens_shape
    small = _SMALL_BYTES // (_LOGIT_BYTES * vocab_size)
    tokens = token_shards * max(width, small, 1)
    size = max(tokens // max(math.prod(rows), 1), 1)
    count = max(-(-length // size), 1)
    return Chunks(length=length, size=max(-(-length // count), 1))


def given_chunks(tokens_shape: Sequence[int], chunk_tokens: int) -> Chunks:
    """Returns chunks of exactly `chunk_tokens` tokens; raises as `chunk_positions` does."""
    return Chunks(length=tokens_shape[-1], size=chunk_positions(tokens_shape, chunk_tokens))


def row_statistics(logits, is_target):
    """Returns `(logsumexp, target's logit)` of each row, in the dtype of the logits.

    Args:
      logits: `[..., V]`, float32 or float64, finite.
      is_target: `[..., V]` booleans, true at each row's target.
    """
    return lax.platform_dependent(logits, is_target, cuda=_one_pass, default=_plain)


def _plain(logits, is_target):
    picked = jnp.where(is_target, logits, 0).sum(axis=-1)
    return jax.nn.logsumexp(logits, axis=-1), picked


@jax.custom_jvp
def _one_pass(logits, is_target):
    lowest = jnp.finfo(logits.dtype).min  # not -inf: the difference of two would be NaN
    start = [jnp.asarray(value, logits.dtype) for value in (lowest, 0, 0)]
    values = (logits, jnp.ones_like(logits), jnp.where(is_target, logits, 0))
    largest, total, picked = lax.reduce(values, tuple(start), _merge, [logits.ndim - 1])
    return largest + jnp.log(total), picked


@_one_pass.defjvp
def _one_pass_jvp(primals, tangents):
    logits, is_target = primals
    return jax.jvp(lambda logits: _plain(logits, is_target), [logits], list(tangents[:1]))


def _merge(left, right):
    """Merges two partial results: the maximum, the sum of exponentials, the target's logit.

    A merge takes a single exponential, which dominates its arithmetic.
    """
    above = left[0] - right[0]
    rescale = jnp.exp(-jnp.abs(above))
    total = jnp.where(above > 0, left[1] + right[1] * rescale, left[1] * rescale + right[1])
    return jnp.maximum(left[0], right[0]), total, left[2] + right[2]
