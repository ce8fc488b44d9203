"""Attention kind `plain`: any chip, any size, float32 softmax, no [S, S] array kept.

Shapes: B batch, S sequence (T for keys), H query heads, K key/value heads, G = H / K, N head size.

As a flash kernel does, the forward pass keeps its output and the logarithm of each row's softmax
sum, and the backward pass rebuilds the probabilities from them (Dao et al. 2022, FlashAttention,
algorithm 4). Those two are what the policy `attention` keeps. One block's scores are still made
whole while it runs.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxckpt.transforms import tags


@jax.custom_vjp
def plain_attention(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS):
    """Returns causal attention; arguments are those of `attention.causal_attention`."""
    return _forward(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS)[0]


def _forward(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS):
    scores_BKGST = _scores(q_BSHN, k_BSKN, segment_ids_BS)
    logsum_BKGS = jax.nn.logsumexp(scores_BKGST, axis=-1)
    probs_BKGST = jnp.exp(scores_BKGST - logsum_BKGS[..., None]).astype(v_BSKN.dtype)
    out_BSKGN = jnp.einsum("BKGST,BTKN->BSKGN", probs_BKGST, v_BSKN)
    return out_BSKGN.reshape(q_BSHN.shape), logsum_BKGS


def _forward_rule(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS):
    kept = _forward(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS)
    out_BSHN, logsum_BKGS = tags.tag_reserved(kept, tags.ATTENTION)
    return out_BSHN, (q_BSHN, k_BSKN, v_BSKN, segment_ids_BS, out_BSHN, logsum_BKGS)


def _backward_rule(residuals, grad_BSHN):
    q_BSHN, k_BSKN, v_BSKN, segment_ids_BS, out_BSHN, logsum_BKGS = residuals
    grouped = functools.partial(_grouped, num_kv_heads=k_BSKN.shape[2])
    q_BSKGN, grad_BSKGN, out_BSKGN = map(grouped, (q_BSHN, grad_BSHN, out_BSHN))
    scores_BKGST = _scores(q_BSHN, k_BSKN, segment_ids_BS)
    probs_BKGST = jnp.exp(scores_BKGST - logsum_BKGS[..., None])
    grad_v_BSKN = _contract("BKGST,BSKGN->BTKN", probs_BKGST, grad_BSKGN)
    grad_probs_BKGST = _contract("BSKGN,BTKN->BKGST", grad_BSKGN, v_BSKN)
    # The softmax's gradient needs sum_t p_t dp_t, which equals the dot product of out and its
    # gradient: [S] numbers a head instead of another [S, S] reduction.
    row_BKGS = _contract("BSKGN,BSKGN->BKGS", out_BSKGN, grad_BSKGN)
    grad_scores_BKGST = probs_BKGST * (grad_probs_BKGST - row_BKGS[..., None])
    grad_scores_BKGST = grad_scores_BKGST / math.sqrt(q_BSHN.shape[-1])
    grad_q_BSKGN = _contract("BKGST,BTKN->BSKGN", grad_scores_BKGST, k_BSKN)
    grad_k_BSKN = _contract("BKGST,BSKGN->BTKN", grad_scores_BKGST, q_BSKGN)
    return (
        grad_q_BSKGN.reshape(q_BSHN.shape).astype(q_BSHN.dtype),
        grad_k_BSKN.astype(k_BSKN.dtype),
        grad_v_BSKN.astype(v_BSKN.dtype),
        None,
    )


plain_attention.defvjp(_forward_rule, _backward_rule)


def _scores(q_BSHN, k_BSKN, segment_ids_BS):
    """Returns float32 scores `[B, K, G, S, T]`, minus infinity where nothing is attended to."""
    q_BSKGN = _grouped(q_BSHN, k_BSKN.shape[2])
    scores_BKGST = _contract("BSKGN,BTKN->BKGST", q_BSKGN, k_BSKN) / math.sqrt(q_BSHN.shape[-1])
    size = q_BSHN.shape[1]
    causal_ST = jnp.arange(size)[:, None] >= jnp.arange(size)[None, :]
    if segment_ids_BS is None:
        return jnp.where(causal_ST, scores_BKGST, -jnp.inf)
    seen_BST = causal_ST & same_document(segment_ids_BS)
    return jnp.where(seen_BST[:, None, None], scores_BKGST, -jnp.inf)


def same_document(segment_ids_BS):
    """Returns `[B, S, T]`, which positions lie in one document."""
    return segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]


def _grouped(x_BSHN, num_kv_heads: int):
    batch, size, heads, head_dim = x_BSHN.shape
    return x_BSHN.reshape(batch, size, num_kv_heads, heads // num_kv_heads, head_dim)


def _contract(spec: str, x, y):
    """Returns the contraction of inputs of one dtype, accumulated and returned in float32."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
