"""Attention kind `splash`: the Pallas kernel that JAX ships for TPUs.

A policy cannot name the kernel's residuals. The kernel's option `residual_checkpoint_name` is
silently ignored on some JAX versions, and a policy on its primitive keeps the softmax statistics
as the kernel writes them, 128 equal columns per row. So the forward pass is run under `jax.vjp`
here, and the residuals are tagged.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import Partial

from jaxckpt.models.device_choice import splash_block
from jaxckpt.transforms import tags


def splash_attention(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS):
    """Returns causal attention; see `attention.causal_attention` for the arguments."""
    heads_first = lambda x: x.swapaxes(1, 2)
    # The kernel does not scale scores; its users scale queries in their own dtype.
    q_BSHN = q_BSHN * jnp.asarray(1 / math.sqrt(q_BSHN.shape[-1]), q_BSHN.dtype)
    out_BHSN = _attend(*map(heads_first, (q_BSHN, k_BSKN, v_BSKN)), segment_ids_BS)
    return heads_first(out_BHSN)


@jax.custom_vjp
def _attend(q_BHSN, k_BKSN, v_BKSN, segment_ids_BS):
    return _kernel(segment_ids_BS, q_BHSN, k_BKSN, v_BKSN)


def _forward_rule(q_BHSN, k_BKSN, v_BKSN, segment_ids_BS):
    given = (q_BHSN, k_BKSN, v_BKSN)
    out_BHSN, reverse = jax.vjp(functools.partial(_kernel, segment_ids_BS), *given)
    leaves, tree = jax.tree.flatten(reverse)
    tagged_BHSN = tags.tag_reserved(out_BHSN, tags.ATTENTION)

    def tagged(leaf):
        if leaf is out_BHSN:
            return tagged_BHSN
        made = jnp.issubdtype(leaf.dtype, jnp.floating) and all(leaf is not x for x in given)
        return tags.tag_reserved(leaf, tags.ATTENTION) if made else leaf

    # The mask's tables stay constants. As residuals they would leave `shard_map` as sharded arrays,
    # and a FLOP counter could not tell which blocks the backward kernel skips.
    constants = [None if isinstance(leaf, Tracer) else leaf for leaf in leaves]
    traced = [tagged(leaf) for leaf in leaves if isinstance(leaf, Tracer)]

    def rebuild(*traced):
        rest = iter(traced)
        return tree.unflatten([next(rest) if one is None else one for one in constants])

    return tagged_BHSN, Partial(rebuild, *traced)


def _backward_rule(residuals, grad_BHSN):
    reverse = residuals.func(*residuals.args)
    return *reverse(grad_BHSN), None


_attend.defvjp(_forward_rule, _backward_rule)


def _kernel(segment_ids_BS, q_BHSN, k_BKSN, v_BKSN):
    # Pallas takes a second to import, and few steps need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, heads, size, _ = q_BHSN.shape
    block = splash_block(size)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    shards: dict[str, Any] = {"head_shards": 1, "q_seq_shards": 1}
    with jax.ensure_compile_time_eval():  # the mask must be a constant under any trace
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([splash.CausalMask((size, size))] * heads),
            block_sizes=splash.BlockSizes(**sizes),
            **shards,
        )
    if segment_ids_BS is None:
        return jax.vmap(kernel)(q_BHSN, k_BKSN, v_BKSN)
    ids = splash.SegmentIds(q=segment_ids_BS, kv=segment_ids_BS)
    return jax.vmap(kernel)(q_BHSN, k_BKSN, v_BKSN, ids)
