"""Attention kind `chunked`: any chip, any size; one chunk of queries at a time.

Shapes: B batch, S sequence, H query heads, K key/value heads, N head size, C queries of a chunk.

A chunk's scores `[B, H, C, S]` are the largest array; plain attention has `[B, H, S, S]` (Rabe,
Staats 2021, Self-attention does not need O(n^2) memory). It is for GPUs without a flash kernel,
such as a T4. Its residuals are plain attention's.

Limits: masked scores are computed too, as in plain attention.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt.models.plain_attention import backward, forward, same_document
from jaxckpt.transforms import tags

_CHUNK = 128  # queries in a chunk; fewer would make products too thin for a GPU


@jax.custom_vjp
def chunked_attention(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS):
    """Returns causal attention; see `attention.causal_attention` for the arguments."""
    return _forward(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS)[0]


def _forward(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS):
    """Returns the attention output, and the logarithms of each chunk's softmax sums."""

    def chunk(_, part):
        mask = _mask(part, k_BSKN, segment_ids_BS)
        return None, forward(part["q"], k_BSKN, v_BSKN, mask)

    parts = {"q": _cut(q_BSHN)} | _places(q_BSHN.shape, segment_ids_BS)
    _, (out, logsums) = lax.scan(chunk, None, parts)
    return _joined(out, q_BSHN), logsums


def _forward_rule(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS):
    kept = _forward(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS)
    out_BSHN, logsums = tags.tag_reserved(kept, tags.ATTENTION)
    return out_BSHN, (q_BSHN, k_BSKN, v_BSKN, segment_ids_BS, out_BSHN, logsums)


def _backward_rule(residuals, grad_BSHN):
    q_BSHN, k_BSKN, v_BSKN, segment_ids_BS, out_BSHN, logsums = residuals

    def chunk(sums, part):
        kept = part["out"], part["logsum"], part["grad"], _mask(part, k_BSKN, segment_ids_BS)
        grad_q, *grads = backward(part["q"], k_BSKN, v_BSKN, *kept)
        return jax.tree.map(jnp.add, sums, grads), grad_q.astype(q_BSHN.dtype)

    # Queries that pad the last chunk have zero gradients, so they add nothing to gradients of keys.
    parts = {"q": _cut(q_BSHN), "out": _cut(out_BSHN), "grad": _cut(grad_BSHN, "constant")}
    parts |= {"logsum": logsums} | _places(q_BSHN.shape, segment_ids_BS)
    wide = jnp.promote_types(q_BSHN.dtype, jnp.float32)
    (grad_k, grad_v), grad_q = lax.scan(chunk, [jnp.zeros(k_BSKN.shape, wide)] * 2, parts)
    return _joined(grad_q, q_BSHN), grad_k.astype(k_BSKN.dtype), grad_v.astype(v_BSKN.dtype), None


chunked_attention.defvjp(_forward_rule, _backward_rule)


def _cut(x, fill: str = "edge"):
    """Returns `[B, S, ...]` as `[S / C, B, C, ...]`; pads the last chunk."""
    batch, size, *rest = x.shape
    chunk = min(_CHUNK, size)
    count = -(-size // chunk)
    padding = [(0, 0), (0, count * chunk - size), *((0, 0) for _ in rest)]
    return jnp.moveaxis(jnp.pad(x, padding, fill).reshape(batch, count, chunk, *rest), 1, 0)


def _joined(chunks, like):
    """Returns `[S / C, B, C, ...]` as `[B, S, ...]` without padding, in the shape of `like`."""
    whole = jnp.moveaxis(chunks, 0, 1)
    return whole.reshape(like.shape[0], -1, *like.shape[2:])[:, : like.shape[1]]


def _places(shape, segment_ids_BS) -> dict:
    positions = {"positions": _cut(jnp.arange(shape[1])[None])}
    return positions if segment_ids_BS is None else positions | {"ids": _cut(segment_ids_BS)}


def _mask(part: dict, keys, segment_ids_BS):
    """Returns the mask of keys that a chunk's queries see: `[C, S]`; `[B, C, S]` if packed."""
    (positions_C,) = part["positions"]
    causal_CS = positions_C[:, None] >= jnp.arange(keys.shape[1])
    if segment_ids_BS is None:
        return causal_CS
    return causal_CS & same_document(part["ids"], segment_ids_BS)
