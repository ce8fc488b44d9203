"""A pre-norm decoder-only Transformer in Flax Linen, checkpointed by a plan.

Shapes: B batch, S sequence, D d_model, H query heads, K key/value heads, N head size, F d_ff,
V vocabulary. Parameters have Qwen3's names, so that its weights fit: `embed_tokens`, `layers`
(stacked `[L, ...]`), `norm`, `lm_head`.

Values are tagged for the policies: `q`, `k`, `v` (projections), `attn` (attention's output), `mid`
(the residual stream between the branches), `gate`, `up` (the MLP's projections).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jaxckpt.linen import Stack
from jaxckpt.models import device_choice
from jaxckpt.models.attention import causal_attention
from jaxckpt.models.config import TransformerConfig
from jaxckpt.models.normalization import rms_norm, rms_norm_rotate, rotate
from jaxckpt.models.sharding import Layout
from jaxckpt.models.swiglu import swiglu_down
from jaxckpt.plans import Plan
from jaxckpt.transforms.tags import tag
from jaxckpt.transforms.tiles import tiled

_INIT = nn.initializers.normal(0.02)


class Transformer(nn.Module):
    """A Transformer from tokens to logits; `features` stops before the head.

    Attributes:
      config: Shapes and options.
      remat: The plan of the stack, or its text, or a policy of `jax.checkpoint`.
      unroll: Blocks unrolled in one trip of the stack's loop.
      layout: The shardings of its arrays on a mesh; None on one device.
    """

    config: TransformerConfig
    remat: str | Plan | Callable = "full"
    unroll: int = 1
    layout: Layout | None = None

    def setup(self):
        """Makes the submodules, under the names of Qwen3's parameters."""
        config, layout = self.config, self.layout
        if self.is_initializing():
            # Parameters do not depend on the kernel, so `init` works on any chip, at any length.
            config, layout = dataclasses.replace(config, attention="plain"), None
        self.embed_tokens = nn.Embed(config.vocab_size, config.d_model, embedding_init=_INIT)
        block = functools.partial(Block, config=config, layout=layout)
        dtype = _dtype(config)  # a block uses all its parameters in this dtype
        self.layers = Stack(
            block, config.num_blocks, remat=self.remat, unroll=self.unroll, dtype=dtype
        )
        self.norm = RMSNorm(config)
        if not config.tied_embeddings:
            self.lm_head = _dense(config, config.vocab_size)

    def __call__(self, tokens_BS, segment_ids_BS=None, *, deterministic: bool = True):
        """Returns logits `[B, S, V]`.

        Args:
          tokens_BS: Token ids, integers.
          segment_ids_BS: Integers: the document of each token in a packed row; a token attends only
            to its own document. None for one document per row. Positions count through a row,
            because rotary attention depends only on their differences. The caller has to leave out
            the loss of a document's last position (`ignore_index`), whose target is the next
            document's first token.
          deterministic: Turns dropout off; False needs `rngs={"dropout": key}`.

        Raises:
          ValueError: Segment ids and tokens differ in shape, or the attention kernel does not take
            the sizes.
        """
        x_BSD = self.features(tokens_BS, segment_ids_BS, deterministic=deterministic)
        if self.config.tied_embeddings:
            embedding_VD: Array = self.embed_tokens.embedding
            return x_BSD @ embedding_VD.T.astype(x_BSD.dtype)
        return self.lm_head(x_BSD)

    def features(self, tokens_BS, segment_ids_BS=None, *, deterministic: bool = True) -> Array:
        """Returns the input of the head, `[B, S, D]`; see `__call__` for the arguments."""
        config = self.config
        embed = self.embed_tokens
        if self.layout is not None and not self.is_initializing():
            embed = functools.partial(self.layout.look_up, embed.embedding)
        # Rows are cast after the look-up, so that the table's gradient is summed in float32.
        x_BSD = embed(tokens_BS).astype(_dtype(config))
        consts = [rotary_table(tokens_BS.shape[1], config.head_dim, config.rope_theta)]
        if segment_ids_BS is not None:
            consts.append(segment_ids_BS)
        x_BSD = self.layers(x_BSD, *consts, deterministic=deterministic)
        return self.norm(x_BSD)


class Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm and added to the residual stream."""

    config: TransformerConfig
    layout: Layout | None = None

    @nn.compact
    def __call__(self, x_BSD, rotary, segment_ids_BS=None, *, deterministic: bool = True):
        """Returns the residual stream after the block, `[B, S, D]`."""
        config = self.config
        stream = (lambda x_BSD: x_BSD) if self.layout is None else self.layout.stream
        dropout = nn.Dropout(config.dropout, deterministic=deterministic)
        x_BSD = stream(x_BSD)
        attention = Attention(config, self.layout, name="self_attn")
        x_norm_BSD = RMSNorm(config, name="input_layernorm")(x_BSD)
        branch_BSD = attention(x_norm_BSD, rotary, segment_ids_BS)
        x_BSD = tag(stream(x_BSD + dropout(branch_BSD)), "mid")
        x_norm_BSD = RMSNorm(config, name="post_attention_layernorm")(x_BSD)
        branch_BSD = SwiGLU(config, name="mlp")(x_norm_BSD)
        return stream(x_BSD + dropout(branch_BSD))


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and optional query/key norms."""

    config: TransformerConfig
    layout: Layout | None = None

    @nn.compact
    def __call__(self, x_BSD, rotary, segment_ids_BS=None):
        """Returns the branch's output, `[B, S, D]`."""
        config = self.config

        def project(name: str, heads: int):
            y = tag(_dense(config, heads * config.head_dim, f"{name}_proj")(x_BSD), name)
            return y.reshape(*x_BSD.shape[:2], heads, config.head_dim)

        q_BSHN = project("q", config.num_heads)
        k_BSKN = project("k", config.num_kv_heads)
        v_BSKN = project("v", config.num_kv_heads)
        if config.qk_norm:
            q_BSHN = RMSNorm(config, name="q_norm")(q_BSHN, rotary)
            k_BSKN = RMSNorm(config, name="k_norm")(k_BSKN, rotary)
        else:
            q_BSHN, k_BSKN = rotate(q_BSHN, rotary), rotate(k_BSKN, rotary)
        attend = functools.partial(causal_attention, kind=config.attention)
        if self.layout is not None:
            attend = functools.partial(self.layout.attend, attend)
        attn_BSHN = attend(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS)
        attn_BSE = tag(attn_BSHN.reshape(*x_BSD.shape[:2], -1), "attn")
        return _dense(config, config.d_model, "o_proj")(attn_BSE)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, GLU variants improve Transformer)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BSD):
        """Returns the branch's output, `[B, S, D]`."""
        config = self.config
        wide, narrow = (config.d_model, config.d_ff), (config.d_ff, config.d_model)
        shapes = {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}
        kernels = [_Kernel(shape, name=name)() for name, shape in shapes.items()]
        return tiled(_swiglu, config.mlp_tiles)(x_BSD, *kernels)


def _swiglu(x_BSD, gate_DF, up_DF, down_FD):
    """Returns the SwiGLU of one tile of positions, or of all of them."""
    gate_BSF = tag(x_BSD @ gate_DF.astype(x_BSD.dtype), "gate")
    up_BSF = tag(x_BSD @ up_DF.astype(x_BSD.dtype), "up")
    return swiglu_down(gate_BSF, up_BSF, down_FD)


class _Kernel(nn.Module):
    """The parameter of a bias-free projection, under the same path as in `flax.linen.Dense`."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self):
        """Returns the kernel."""
        return self.param("kernel", _INIT, self.shape)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, followed by rotary positions if a table is given."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, rotary=None):
        """Returns `x` normalized, in the dtype of the computation."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x = x.astype(_dtype(self.config))
        if rotary is None:
            return rms_norm(x, scale, self.config.norm_eps)
        return rms_norm_rotate(x, scale, rotary, self.config.norm_eps)


def rotary_table(size: int, head_dim: int, theta: float):
    """Returns cosines and sines `[2, S, N/2]` of the rotary angles (Su et al. 2021, RoFormer)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.arange(size, dtype=jnp.float32)[:, None] * frequencies
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def _dense(config: TransformerConfig, features: int, name: str | None = None) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=_dtype(config), kernel_init=_INIT, name=name)


def _dtype(config: TransformerConfig) -> str:
    """Returns the dtype of the computation; an unresolved `auto` is for this process's chip."""
    if config.dtype != "auto":
        return config.dtype
    return device_choice.choose_dtype(device_choice.local_device())[0]
