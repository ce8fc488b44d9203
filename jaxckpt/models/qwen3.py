"""Qwen3's checkpoints: which of their tensors is which parameter of the Transformer, by name.

    config = qwen3.config_of(json.loads(text_of_config_json))
    for tensor in qwen3.tensors(config):
        print(tensor.name, tensor.shape, "->", tensor.path, tensor.block)

Names, layouts and `config.json` are as Hugging Face's transformers writes them. This file only maps
names: it reads no checkpoint and needs no JAX.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

from jaxckpt.models.config import ModelError, TransformerConfig

MODEL_TYPE = "qwen3"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# A field of TransformerConfig -> its name in config.json. Rotary positions are read separately,
# because newer files have a table for them.
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
_OPTIONAL = {"tie_word_embeddings": False}  # transformers leaves out its default values

# Other names for a number, in transformers and in other libraries.
_ALIASES = {
    "vocab_size": ("n_vocab",),
    "num_hidden_layers": ("num_layers", "n_layer", "n_layers"),
    "hidden_size": ("d_model", "n_embd", "dim"),
    "num_attention_heads": ("num_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads", "num_query_groups"),
    "head_dim": ("kv_channels",),
    "intermediate_size": ("ffn_hidden_size", "n_inner", "d_ff"),
    "rms_norm_eps": ("norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "rope_theta": ("rotary_emb_base", "rope_base"),
    "hidden_act": ("hidden_activation", "activation_function"),
    "dtype": ("torch_dtype",),
}
_ROTARY_TABLES = ("rope_parameters", "rope_scaling")
_QK_NORM = ("qk_norm", "use_qk_norm", "qk_layernorm")

# Words of keys that ask for features the Transformer lacks: biases, dropout, windows, scaled or
# partial rotations, experts, quantized weights.
_ARITHMETIC = re.compile(
    r"(?:^|_)(?:act|activation|attention|attn|bias|cap|clip|drop|dropout|experts?|factor|fp8|gate|"
    r"layerdrop|logits?|lora|mlp|moe|multiplier|nope|norm|pct|pdrop|position|quant|quantization|"
    r"residual|rope|rotary|router|scale|scalar|scaling|sinks?|sliding|softcap|softcapping|window)"
    r"(?:_|$)",
    re.IGNORECASE,
)
# A value of 1 under such a key changes nothing, unless the key replaces attention's own scale.
_FACTOR = re.compile(r"^(?!.*attention).*(?:factor|multiplier|pct|scaling)$", re.IGNORECASE)
# Keys with such a word that change nothing here: how the library computes, limits, and values that
# matter only if another key turns them on.
_ASK_NOTHING = frozenset(
    {
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        *("max_position_embeddings", "max_window_layers", "sliding_window", "layer_types"),
        *("output_attentions", "use_flash_attn", *_ROTARY_TABLES, *_QK_NORM),
    }
)
_NOTHING = (None, False, 0, 0.0, "", "default", [], {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a checkpoint and its place in the tree.

    Attributes:
      name: The name in the checkpoint, such as `model.layers.3.mlp.up_proj.weight`.
      shape: The shape in the checkpoint.
      path: The path of the parameter, such as `("layers", "mlp", "up_proj", "kernel")`.
      block: The row of a stacked parameter; None for a parameter outside the stack.
      transposed: Whether the checkpoint has `[out, in]` where the tree has `[in, out]`.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    block: int | None = None
    transposed: bool = False


def tensors(config: TransformerConfig) -> tuple[Tensor, ...]:
    """Returns every tensor of a Qwen3 of this shape; tensors of one parameter are consecutive.

    Raises:
      ModelError: The Transformer has no norms of queries and keys, so it is no Qwen3.
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
    """Returns the shape and kind of one block's parameters, by their names in the block."""
    width, hidden = config.d_model, config.d_ff
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_norm": (config.head_dim,),
        "self_attn.k_norm": (config.head_dim,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    return {name: (s, "scale" if len(s) == 1 else "kernel") for name, s in shapes.items()}


def config_of(hf: Mapping[str, Any]) -> TransformerConfig:
    """Returns the shape that a `config.json` describes.

    Args:
      hf: The content of the `config.json`.

    Raises:
      ModelError: The file is not of Qwen3, a key is missing or of another type, or the Transformer
        lacks a feature. All faults are listed.
    """
    kind = hf.get("model_type")
    if kind != MODEL_TYPE:
        raise ModelError(f"model_type is {kind!r}; valid: {MODEL_TYPE!r}")
    _check_names(hf)
    asked = _asked_for(hf)
    if asked:
        raise ModelError(f"the Transformer has no {', no '.join(asked)}")
    values = {**_OPTIONAL, **hf, "rope_theta": _rope_theta(hf)}
    names = {**_FIELDS, "rope_theta": "rope_theta"}
    fields = dataclasses.fields(TransformerConfig)
    types: dict[str, Any] = {field.name: field.type for field in fields}
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
      config: The Transformer's configuration.
      dtype: The dtype of the checkpoint's tensors, `"bfloat16"` or `"float32"`.
      max_positions: The length of the longest sequence.

    Raises:
      ModelError: The Transformer has no norms of queries and keys, so it is no Qwen3.
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
    """Returns the fields that a checkpoint fixes: all but dropout, dtype and attention kernel."""
    return {name: getattr(config, name) for name in (*_FIELDS, "rope_theta", "qk_norm")}


def _check_is_qwen3(config: TransformerConfig):
    if not config.qk_norm:
        raise ModelError("qk_norm is false; a Qwen3 normalizes queries and keys")


def _check_names(hf: Mapping[str, Any]):
    """Raises if two keys with the same meaning differ: a library would follow only one of them."""
    different = []
    for name, others in _ALIASES.items():
        said = {key: hf[key] for key in (name, *others) if hf.get(key) is not None}
        if name == "rope_theta":
            said |= {f"{table}.rope_theta": theta for table, theta in _tabled_thetas(hf).items()}
        if any(value != next(iter(said.values())) for value in said.values()):
            different.append(" but ".join(f"{key} is {value!r}" for key, value in said.items()))
    layers, kinds = hf.get("num_hidden_layers"), hf.get("layer_types")
    if isinstance(kinds, list) and kinds and len(kinds) != layers:
        different.append(f"num_hidden_layers is {layers!r} but layer_types has {len(kinds)}")
    if different:
        raise ModelError("; ".join(different))


def _asked_for(hf: Mapping[str, Any]) -> list[str]:
    """Returns the features that a file asks for and the Transformer lacks."""
    known = {*_FIELDS.values(), *_ALIASES, *itertools.chain(*_ALIASES.values()), *_ASK_NOTHING}
    activations = ("hidden_act", *_ALIASES["hidden_act"])
    found = [f"{key} {hf[key]!r}" for key in activations if hf.get(key) not in ("silu", None)]
    found += [f"{key} {hf[key]!r}" for key in _QK_NORM if hf.get(key) not in (True, None)]
    found += [
        f"{key} {value!r}"
        for key, value in hf.items()
        if key not in known and _changes_arithmetic(key, value)
    ]
    for name in _ROTARY_TABLES:
        table = hf.get(name) or {}
        if not isinstance(table, Mapping):
            found.append(f"{name} {table!r}")
            continue
        kinds = [table[key] for key in ("rope_type", "type") if table.get(key) is not None]
        found += [f"rotary scaling {kind!r}" for kind in dict.fromkeys(kinds) if kind != "default"]
        rest = set(table) - {"rope_type", "type", "rope_theta", "original_max_position_embeddings"}
        if not found:
            wanted = (key for key in sorted(rest) if table[key] not in (*_NOTHING, 1))
            found += [f"{name} {key} {table[key]!r}" for key in wanted]
    other = sorted(set(hf.get("layer_types") or ()) - {"full_attention"})
    return found + [f"layer_types {name!r}" for name in other]


def _changes_arithmetic(key: str, value: Any) -> bool:
    if value in _NOTHING or not _ARITHMETIC.search(key):
        return False
    return not (_FACTOR.match(key) and value == 1 and value is not True)


def _tabled_thetas(hf: Mapping[str, Any]) -> dict[str, Any]:
    tables = {name: hf.get(name) for name in _ROTARY_TABLES}
    return {
        name: table["rope_theta"]
        for name, table in tables.items()
        if isinstance(table, Mapping) and table.get("rope_theta") is not None
    }


def _rope_theta(hf: Mapping[str, Any]) -> Any:
    given = hf.get("rope_theta")
    return next(iter(_tabled_thetas(hf).values()), None) if given is None else given


def _has_type(value: Any, wanted: type) -> bool:
    if wanted is bool or isinstance(value, bool):
        return wanted is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if wanted is float else wanted)
