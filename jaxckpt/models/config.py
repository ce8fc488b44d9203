"""The shape of a decoder-only Transformer, as frozen data without JAX."""

import dataclasses
from typing import Literal

from jaxckpt.losses.sizes import divisors
from jaxckpt.plans.errors import UserError, check_word

_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
ATTENTION_KINDS = ("auto", "cudnn", "splash", "chunked", "plain")


class ModelError(UserError, ValueError):
    """A model is not valid, or not valid on this chip: one line that says what is valid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shapes and options of `jaxckpt.models.Transformer`; the defaults are a small model.

    Attributes:
      vocab_size: Number of token ids; 256 for bytes.
      num_blocks: Blocks in the stack.
      d_model: Width of the residual stream.
      num_heads: Query heads.
      num_kv_heads: Key and value heads; must divide `num_heads`.
      head_dim: Size of each head, even; independent of `d_model`, as in Qwen3.
      d_ff: Width of the SwiGLU.
      qk_norm: Normalize the queries and keys of each head, as in Qwen3.
      tied_embeddings: Use the embedding table as the output head.
      rope_theta: Base of the rotary frequencies.
      norm_eps: Epsilon of every RMSNorm.
      dropout: Rate of dropout on the output of attention and MLP; 0 turns it off.
      dtype: Dtype of the computation; parameters are always float32. auto is bfloat16 on TPUs and
        on GPUs that have it, float16 on older GPUs, float32 elsewhere.
      attention: The attention kernel: cudnn on NVIDIA GPUs, splash on TPUs, chunked (a part of the
        queries at a time) and plain anywhere; auto is the one that the chip and the sizes allow.
      mlp_tiles: Tiles of a sequence that the MLP runs one after another, so that only one tile's
        hidden values are in memory. Policies see no `gate` and `up` then.

    Raises:
      ModelError: A word is unknown, a size is below 1, heads do not divide, `head_dim` is odd, or
        the dropout rate is outside [0, 1).
    """

    vocab_size: int = 256
    num_blocks: int = 8
    d_model: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    d_ff: int = 192
    qk_norm: bool = True
    tied_embeddings: bool = True
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    dropout: float = 0.0
    dtype: Literal["auto", "float32", "bfloat16", "float16", "f32", "bf16", "f16"] = "auto"
    attention: Literal["auto", "cudnn", "splash", "chunked", "plain"] = "auto"
    mlp_tiles: int = 1

    def __post_init__(self):
        sizes = ("vocab_size", "num_blocks", "d_model", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "d_ff", "mlp_tiles"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}; the least is 1")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}; "
                f"valid: {', '.join(map(str, divisors(self.num_heads)))}"
            )
        if self.head_dim % 2:
            raise ModelError(
                f"head_dim {self.head_dim} is odd; rotary positions turn pairs of components, so "
                f"it is even, such as {self.head_dim + 1}"
            )
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout is a rate in [0, 1), not {self.dropout}")
        object.__setattr__(self, "dtype", _DTYPES.get(self.dtype, self.dtype))
        check_word("dtype", self.dtype, ("auto", *_DTYPES.values()), ModelError)
        check_word("attention", self.attention, ATTENTION_KINDS, ModelError)
