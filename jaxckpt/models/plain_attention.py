"""Attention kind `plain`: any chip, any size, float32 softmax, no [S, S] array kept.

Shapes: B batch, S sequence (T for keys), H query heads, K key/value heads, G = H / K, N head size.

Like a flash kernel, the forward pass keeps its output and the logarithm of each row's softmax sum,
and the backward pass recomputes the probabilities from them (Dao et al. 2022, FlashAttention,
algorithm 4). The policy `attention` keeps these two. While a block runs, its whole scores are in
memory.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxckpt.transforms import tags


@jax.custom_vjp
def plain_attention(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS):
    """Returns causal attention; see `attention.causal_attention` for the arguments."""
    return forward(q_BSHN, k_BSKN, v_BSKN, _mask(q_BSHN.shape[1], segment_ids_BS))[0]


def _forward_rule(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS):
    kept = forward(q_BSHN, k_BSKN, v_BSKN, _mask(q_BSHN.shape[1], segment_ids_BS))
    out_BSHN, logsum_BKGS = tags.tag_reserved(kept, tags.ATTENTION)
    return out_BSHN, (q_BSHN, k_BSKN, v_BSKN, segment_ids_BS, out_BSHN, logsum_BKGS)


def _backward_rule(residuals, grad_BSHN):
    q_BSHN, k_BSKN, v_BSKN, segment_ids_BS, out_BSHN, logsum_BKGS = residuals
    mask = _mask(q_BSHN.shape[1], segment_ids_BS)
    grads = backward(q_BSHN, k_BSKN, v_BSKN, out_BSHN, logsum_BKGS, grad_BSHN, mask)
    pairs = zip(grads, (q_BSHN, k_BSKN, v_BSKN), strict=True)
    return *(grad.astype(x.dtype) for grad, x in pairs), None


plain_attention.defvjp(_forward_rule, _backward_rule)


def _mask(size: int, segment_ids_BS):
    """Returns the mask of keys that each query sees: `[S, S]`; `[B, S, S]` if packed."""
    causal_ST = jnp.arange(size)[:, None] >= jnp.arange(size)[None, :]
    if segment_ids_BS is None:
        return causal_ST
    return causal_ST & same_document(segment_ids_BS, segment_ids_BS)


def forward(q_BSHN, k_BTKN, v_BTKN, mask):
    """Returns attention `[B, S, H, N]`, and the logarithms of its softmax sums `[B, K, G, S]`.

    `mask` is `[S, T]` or `[B, S, T]`, true where a query sees a key; every query sees a key.
    """
    scores_BKGST = _scores(q_BSHN, k_BTKN, mask)
    logsum_BKGS = jax.nn.logsumexp(scores_BKGST, axis=-1)
    probs_BKGST = jnp.exp(scores_BKGST - logsum_BKGS[..., None]).astype(v_BTKN.dtype)
    out_BSKGN = jnp.einsum("BKGST,BTKN->BSKGN", probs_BKGST, v_BTKN)
    return out_BSKGN.reshape(q_BSHN.shape), logsum_BKGS


def backward(q_BSHN, k_BTKN, v_BTKN, out_BSHN, logsum_BKGS, grad_BSHN, mask):
    """Returns the gradients of queries, keys and values, in float32 or wider.

    `out_BSHN`, `logsum_BKGS` and `mask` are the results and the mask of `forward`; `grad_BSHN` is
    the gradient of `out_BSHN`.
    """
    grouped = functools.partial(_grouped, num_kv_heads=k_BTKN.shape[2])
    q_BSKGN, grad_BSKGN, out_BSKGN = map(grouped, (q_BSHN, grad_BSHN, out_BSHN))
    scores_BKGST = _scores(q_BSHN, k_BTKN, mask)
    probs_BKGST = jnp.exp(scores_BKGST - logsum_BKGS[..., None])
    grad_v_BTKN = _contract("BKGST,BSKGN->BTKN", probs_BKGST, grad_BSKGN)
    grad_probs_BKGST = _contract("BSKGN,BTKN->BKGST", grad_BSKGN, v_BTKN)
    # The softmax's gradient needs sum_t p_t dp_t, which equals the dot product of out and its
    # gradient. This takes [S] numbers per head instead of another [S, S] reduction.
    row_BKGS = _contract("BSKGN,BSKGN->BKGS", out_BSKGN, grad_BSKGN)
    grad_scores_BKGST = probs_BKGST * (grad_probs_BKGST - row_BKGS[..., None])
    grad_scores_BKGST = grad_scores_BKGST / math.sqrt(q_BSHN.shape[-1])
    grad_q_BSKGN = _contract("BKGST,BTKN->BSKGN", grad_scores_BKGST, k_BTKN)
    grad_k_BTKN = _contract("BKGST,BSKGN->BTKN", grad_scores_BKGST, q_BSKGN)
    return grad_q_BSKGN.reshape(q_BSHN.shape), grad_k_BTKN, grad_v_BTKN


def _scores(q_BSHN, k_BTKN, mask):
    """Returns float32 scores `[B, K, G, S, T]`, minus infinity where the mask is false."""
    q_BSKGN = _grouped(q_BSHN, k_BTKN.shape[2])
    scores_BKGST = _contract("BSKGN,BTKN->BKGST", q_BSKGN, k_BTKN) / math.sqrt(q_BSHN.shape[-1])
    return jnp.where(mask if mask.ndim == 2 else mask[:, None, None], scores_BKGST, -jnp.inf)


def same_document(queries_BS, keys_BT):
    """Returns booleans `[B, S, T]`, true if a query and a key have the same segment id."""
    return queries_BS[:, :, None] == keys_BT[:, None, :]


def _grouped(x_BSHN, num_kv_heads: int):
    batch, size, heads, head_dim = x_BSHN.shape
    return x_BSHN.reshape(batch, size, num_kv_heads, heads // num_kv_heads, head_dim)


def _contract(spec: str, x, y):
    """Returns the contraction of inputs of one dtype, accumulated and returned in float32."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
