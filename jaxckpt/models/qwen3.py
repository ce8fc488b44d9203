"""Qwen3's checkpoints by name: which tensor of theirs is which part of the Transformer's tree.

    config = qwen3.config_of(json.loads(text_of_config_json))
    for tensor in qwen3.tensors(config):
        print(tensor.name, tensor.shape, "->", tensor.path, tensor.block)

Names, layouts and `config.json` are those that Hugging Face's transformers writes. This is the
mapping alone: no file is touched, and JAX is not needed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxckpt.models.config import ModelError, TransformerConfig

MODEL_TYPE = "qwen3"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# A field of TransformerConfig, and its name in config.json. Rotary positions are apart: newer files
# have a table for them.
_FIELDS = {
    "vocab_size": "vocab_size",
    "num_blocks": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
_OPTIONAL = {"tie_word_embeddings": False}  # transformers leaves out what it takes by default

# What the Transformer does not have: keys, and the values that ask for nothing.
_NOT_THERE = {
    "attention_bias": (False, None),
    "hidden_act": ("silu", None),
    "use_sliding_window": (False, None),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a checkpoint and its place in the tree.

    Attributes:
      name: In the checkpoint, such as `model.layers.3.mlp.up_proj.weight`.
      shape: In the checkpoint.
      path: Of the parameter in the tree, such as `("layers", "mlp", "up_proj", "kernel")`.
      block: Its row of a stacked parameter; None for a parameter outside the stack.
      transposed: Whether the checkpoint has `[out, in]` where the tree has `[in, out]`.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    block: int | None = None
    transposed: bool = False


def tensors(config: TransformerConfig) -> tuple[Tensor, ...]:
    """Returns every tensor of a Qwen3 of this shape, those of one parameter in a row.

    Raises:
      ModelError: A Transformer that is no Qwen3: it has no norms of queries and keys.
    """
    _check_is_qwen3(config)
    embedding = (config.vocab_size, config.d_model)
    found = [Tensor(name=EMBEDDING, shape=embedding, path=("embed_tokens", "embedding"))]
    for layer, (shape, kind) in _block_shapes(config).items():
        for block in range(config.num_blocks):
            tensor = Tensor(
                name=f"model.layers.{block}.{layer}.weight",
                shape=shape,
                path=("layers", *layer.split("."), kind),
                block=block,
                transposed=kind == "kernel",
            )
            found.append(tensor)
    found.append(Tensor(name="model.norm.weight", shape=(config.d_model,), path=("norm", "scale")))
    if not config.tied_embeddings:
        path = ("lm_head", "kernel")
        found.append(Tensor(name=HEAD, shape=embedding, path=path, transposed=True))
    return tuple(found)


def _block_shapes(config: TransformerConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the shape and kind of one block's parameters, by their name below the block's."""
    width, hidden = config.d_model, config.d_ff
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    kernels = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    scales = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_norm": (config.head_dim,),
        "self_attn.k_norm": (config.head_dim,),
    }
    found = {name: (shape, "scale") for name, shape in scales.items()}
    return found | {name: (shape, "kernel") for name, shape in kernels.items()}


def config_of(hf: Mapping[str, Any]) -> TransformerConfig:
    """Returns the shape that a `config.json` describes.

    Args:
      hf: Its content.

    Raises:
      ModelError: Not Qwen3, a key that is missing or of another type, or something that the
        Transformer does not have. All of them are listed.
    """
    kind = hf.get("model_type")
    if kind != MODEL_TYPE:
        raise ModelError(f"model_type is {kind!r}; valid: {MODEL_TYPE!r}")
    asked = _asked_for(hf)
    if asked:
        raise ModelError(f"the Transformer has no {', no '.join(asked)}")
    values = {**_OPTIONAL, **hf, "rope_theta": _rope_theta(hf)}
    names = {**_FIELDS, "rope_theta": "rope_theta"}
    types: dict[str, Any] = {
        field.name: field.type for field in dataclasses.fields(TransformerConfig)
    }
    missing = [name for name in names.values() if values.get(name) is None]
    if missing:
        raise ModelError(f"it has no {', no '.join(missing)}")
    wrong = [
        f"{name} is {values[name]!r}, where {types[field].__name__} is needed"
        for field, name in names.items()
        if not _has_type(values[name], types[field])
    ]
    if wrong:
        raise ModelError("; ".join(wrong))
    return TransformerConfig(**{field: types[field](values[n]) for field, n in names.items()})


def config_json(config: TransformerConfig, *, dtype: str, max_positions: int) -> dict[str, Any]:
    """Returns the content of a `config.json` from which transformers builds the same model.

    Args:
      config: The Transformer's.
      dtype: Of the tensors beside it, `"bfloat16"` or `"float32"`.
      max_positions: The longest sequence that it is for.

    Raises:
      ModelError: As `tensors`.
    """
    _check_is_qwen3(config)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": MODEL_TYPE,
        **{name: getattr(config, field) for field, name in _FIELDS.items()},
        "rope_theta": config.rope_theta,
        "max_position_embeddings": max_positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "torch_dtype": dtype,
    }


def shape(config: TransformerConfig) -> dict[str, Any]:
    """Returns what a checkpoint decides of a Transformer: its fields but dropout, dtype, kernel."""
    return {name: getattr(config, name) for name in (*_FIELDS, "rope_theta", "qk_norm")}


def _check_is_qwen3(config: TransformerConfig):
    if not config.qk_norm:
        raise ModelError("qk_norm is false; a Qwen3 normalizes queries and keys")


def _asked_for(hf: Mapping[str, Any]) -> list[str]:
    """Returns what a file asks for that the Transformer does not have."""
    found = [
        f"{key} {hf[key]!r}" for key, nothing in _NOT_THERE.items() if hf.get(key) not in nothing
    ]
    for table in ("rope_scaling", "rope_parameters"):
        scaling = hf.get(table) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            found.append(f"rotary scaling {kind!r}")
    other = sorted(set(hf.get("layer_types") or ()) - {"full_attention"})
    return found + [f"layer_types {name!r}" for name in other]


def _rope_theta(hf: Mapping[str, Any]) -> Any:
    table = hf.get("rope_parameters") or {}
    return hf.get("rope_theta", table.get("rope_theta"))


def _has_type(value: Any, wanted: type) -> bool:
    if wanted is bool or isinstance(value, bool):
        return wanted is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if wanted is float else wanted)
