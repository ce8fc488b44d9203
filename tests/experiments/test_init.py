"""Starting from a folder of transformers' Qwen3: what is read, and every folder that is refused."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from experiments.cli import main
from experiments.config import ConfigError, TrainConfig, load_toml
from experiments.train import train
from experiments.training.step import init_state
from experiments.weights.load import check_init, load_params, read_shape
from jaxckpt.models import TransformerConfig, qwen3
from tests.experiments import hf_folders

ROOT = Path(__file__).parents[2]
FIELDS = dataclasses.fields(TransformerConfig)
UNTIED = TransformerConfig(**qwen3.shape(hf_folders.CONFIG) | {"tied_embeddings": False})


def config_from(folder: Path, **changes) -> TrainConfig:
    return TrainConfig(init=folder, model=read_shape(folder), **changes)


@pytest.mark.parametrize("files, dtype", [(1, ml_dtypes.bfloat16), (3, np.float32)])
def test_every_tensor_is_in_its_place(files, dtype, tmp_path):
    saved = hf_folders.write(tmp_path, UNTIED, files=files, dtype=dtype)
    config = config_from(tmp_path)
    assert check_init(config) is None and config.model == UNTIED
    like = jax.eval_shape(lambda: init_state(config)).params
    flat = traverse_util.flatten_dict(load_params(tmp_path, like), sep="/")
    assert flat["embed_tokens/embedding"].dtype == np.float32
    np.testing.assert_array_equal(
        flat["embed_tokens/embedding"], saved["model.embed_tokens.weight"].astype(np.float32)
    )
    np.testing.assert_array_equal(flat["lm_head/kernel"].T, saved["lm_head.weight"])
    for block in range(3):
        name = f"model.layers.{block}"
        down = saved[f"{name}.mlp.down_proj.weight"]
        np.testing.assert_array_equal(flat["layers/mlp/down_proj/kernel"][block].T, down)
        norm = saved[f"{name}.self_attn.k_norm.weight"]
        np.testing.assert_array_equal(flat["layers/self_attn/k_norm/scale"][block], norm)
    assert len(saved) == 3 + 3 * 11 and len(flat) == 3 + 11


def test_frozen_parameters_are_loaded_in_the_dtype_of_the_computation(tmp_path):
    hf_folders.write(tmp_path, dtype=np.float32)
    model = TransformerConfig(**qwen3.shape(hf_folders.CONFIG), dtype="bf16")
    config = TrainConfig(init=tmp_path, model=model, trainable=("layers/self_attn/q_proj/*",))
    params = load_params(tmp_path, jax.eval_shape(lambda: init_state(config)).params)
    dtypes = {p: x.dtype for p, x in traverse_util.flatten_dict(params, sep="/").items()}
    learning = dtypes.pop("layers/self_attn/q_proj/kernel")
    assert learning == jnp.float32 and set(dtypes.values()) == {jnp.dtype("bfloat16")}


def test_a_head_saved_beside_tied_embeddings_must_be_the_same(tmp_path):
    tensors = hf_folders.random_tensors(hf_folders.CONFIG, np.float32)
    head = tensors[qwen3.EMBEDDING].copy()
    hf_folders.write(tmp_path, dtype=np.float32, tensors={**tensors, qwen3.HEAD: head})
    check_init(config_from(tmp_path))
    head[-1, -1] += 1
    hf_folders.write(tmp_path, dtype=np.float32, tensors={**tensors, qwen3.HEAD: head})
    with pytest.raises(ConfigError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        check_init(config_from(tmp_path))


def test_weights_are_checked_without_jax(tmp_path):
    """Such a head, in bfloat16, is in the published Qwen3-0.6B."""
    tensors = hf_folders.random_tensors(hf_folders.CONFIG, ml_dtypes.bfloat16)
    hf_folders.write(tmp_path, tensors={**tensors, qwen3.HEAD: tensors[qwen3.EMBEDDING]})
    code = (
        "import pathlib, sys\n"
        "from experiments.weights.load import check_weights, read_shape\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "check_weights(folder, read_shape(folder))\n"
        "print('jax' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


SHAPES = [
    ({"model_type": "llama"}, "model_type is 'llama'; valid: 'qwen3'"),
    ({"model_type": None}, "model_type is None; valid: 'qwen3'"),
    ({"hidden_size": None, "rope_theta": None}, "it has no hidden_size, no rope_theta"),
    ({"hidden_size": "16"}, "hidden_size is '16', where int is needed"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, where bool is needed"),
    ({"num_key_value_heads": 3}, "does not divide num_heads 2"),
    (
        {"hidden_act": "gelu", "rope_scaling": {"type": "yarn"}, "use_sliding_window": True},
        "the Transformer has no hidden_act 'gelu', no use_sliding_window True, no rotary scaling "
        "'yarn'",
    ),
    (
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "layer_types 'sliding_attention'",
    ),
    ({"layer_types": ["full_attention"]}, "num_hidden_layers is 3 but layer_types has 1"),
    # Two names for one number.
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "rope_theta is 1000000.0 but rope_parameters.rope_theta is 500000.0",
    ),
    ({"n_layer": 12}, "num_hidden_layers is 3 but n_layer is 12"),
    ({"layer_norm_eps": 1e-5}, "rms_norm_eps is 1e-06 but layer_norm_eps is 1e-05"),
    # What the Transformer does not compute, known by name or not.
    ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "llama3"}}, "no rotary scaling 'llama3'"),
    ({"rope_scaling": {"type": "default", "factor": 4.0}}, "no rope_scaling factor 4.0"),
    ({"partial_rotary_factor": 0.5}, "no partial_rotary_factor 0.5"),
    (
        {"attention_dropout": 0.1, "resid_pdrop": 0.2},
        "no attention_dropout 0.1, no resid_pdrop 0.2",
    ),
    ({"attn_logit_softcapping": 50.0}, "no attn_logit_softcapping 50.0"),
    ({"attention_multiplier": 1.0}, "no attention_multiplier 1.0"),
    ({"mlp_bias": True, "num_experts": 8}, "no mlp_bias True, no num_experts 8"),
    ({"quantization_config": {"bits": 4}}, "no quantization_config {'bits': 4}"),
    ({"use_qk_norm": False}, "no use_qk_norm False"),
]


@pytest.mark.parametrize("changes, message", SHAPES)
def test_a_config_json_of_another_model(changes, message, tmp_path):
    hf_folders.write(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        read_shape(tmp_path)
    assert message in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


def test_keys_that_ask_for_nothing_are_no_matter(tmp_path):
    nothing = {
        **{"sliding_window": 4096, "max_window_layers": 28, "attention_dropout": 0.0},
        **{"rope_scaling": {"type": "default", "rope_theta": 1e6}, "partial_rotary_factor": 1.0},
        **{"_attn_implementation": "sdpa", "pruned_heads": {}, "num_experts": 0, "use_cache": True},
        **{"embedding_multiplier": 1.0, "logits_scaling": 1, "qk_norm": True, "n_layer": 3},
        **{"temperature": 0.6, "mask_token_id": 7, "layer_types": ["full_attention"] * 3},
        **{"quantization_config": None, "initializer_range": 0.02},
    }
    hf_folders.write(tmp_path, **nothing)
    assert qwen3.shape(read_shape(tmp_path)) == qwen3.shape(hf_folders.CONFIG)


def test_newer_files_have_a_table_for_rotary_positions(tmp_path):
    table = {"rope_type": "default", "rope_theta": 5e5}
    hf_folders.write(tmp_path, rope_theta=None, rope_parameters=table)
    assert read_shape(tmp_path).rope_theta == 5e5


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    tensors = hf_folders.random_tensors(hf_folders.CONFIG, np.float32)
    for block in (0, 1, 2):
        del tensors[f"model.layers.{block}.mlp.up_proj.weight"]
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros([32, 16], np.float32)
    tensors["model.norm.bias"] = np.zeros([16], np.float32)
    tensors["model.layers.2.mlp.gate_proj.weight"] = np.zeros([16, 32], np.float32)
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros([16, 32], np.float16)
    hf_folders.write(tmp_path, dtype=np.float32, tensors=tensors)
    with pytest.raises(ConfigError) as caught:
        check_init(config_from(tmp_path))
    assert str(caught.value).split("; ")[1:] == [
        "missing: model.layers.1.self_attn.q_norm.weight, model.layers.{0-2}.mlp.up_proj.weight",
        "not of this model: model.layers.3.mlp.up_proj.weight, model.norm.bias",
        "of shape [16, 32], needed [32, 16]: model.layers.2.mlp.gate_proj.weight",
        "of dtype F16, needed F32 or BF16: model.layers.0.mlp.down_proj.weight",
    ]


def spoil(folder: Path, name: str, content: bytes | str | None):
    path = folder / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


FILES = [
    (1, "config.json", None, "cannot read"),
    (1, "config.json", "{", "is not JSON"),
    (1, "config.json", "[]", "is no JSON object"),
    (1, "model.safetensors", None, "holds no model.safetensors and no model.safetensors.index"),
    (1, "model.safetensors", b"\0" * 100, "is not a readable safetensors file"),
    (2, "model-00002-of-00002.safetensors", None, "which is not there"),
    (2, "model.safetensors.index.json", "{}", "has no weight_map"),
    (2, "model.safetensors.index.json", '{"weight_map": {"a": "../b"}}', "has no weight_map"),
    (1, "tokenizer.json", "{}", "is not a readable tokenizer"),
]


@pytest.mark.parametrize("files, name, content, message", FILES)
def test_files_that_cannot_be_read(files, name, content, message, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "hf"
    hf_folders.write(folder, files=files)
    spoil(folder, name, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(train, [f"--init={folder}"])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_pickles_are_named(tmp_path):
    hf_folders.write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin are of another format"):
        check_init(config_from(tmp_path))


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    hf_folders.write(tmp_path, dataclasses.replace(hf_folders.CONFIG, vocab_size=279))
    hf_folders.write_tokenizer(tmp_path, vocab_size=280)
    with pytest.raises(ConfigError, match="has token 279, the model's vocabulary ends at 278"):
        check_init(config_from(tmp_path))


def test_refused_before_jax_is_imported(tmp_path):
    """A configuration that disagrees, wherever it comes from, is told of every field."""
    hf_folders.write(tmp_path / "hf")
    (tmp_path / "x.toml").write_text(f"init = '{tmp_path}/hf'\n[model]\nd_ff = 48\n")
    code = (
        "import sys\n"
        "from experiments.cli import main\n"
        "from experiments.train import train\n"
        "try:\n"
        "    main(train, sys.argv[1:])\n"
        "finally:\n"
        "    print('jax' in sys.modules)\n"
    )
    flags = [f"--config={tmp_path}/x.toml", "--num-blocks=4", f"--out={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == "False\n"
    assert "num_blocks is 4, there 3; d_ff is 48, there 32" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_there(tmp_path, capsys):
    (tmp_path / "Qwen3-0.6B").mkdir()
    with pytest.raises(SystemExit):
        main(train, ["--init", str(tmp_path / "Qwen-0.6B")])
    assert "(did you mean 'Qwen3-0.6B'?)" in capsys.readouterr().err


def test_the_mapping_goes_both_ways():
    content = qwen3.config_json(UNTIED, dtype="float32", max_positions=64)
    assert qwen3.config_of(json.loads(json.dumps(content))) == UNTIED
    with pytest.raises(ValueError, match="qk_norm is false"):
        qwen3.tensors(TransformerConfig(qk_norm=False))


# As their files say; those of tied embeddings hold the head once more.
PUBLISHED = [("qwen3_0p6b", 751_632_384 - 151936 * 1024), ("qwen3_8b", 8_190_735_360)]


@pytest.mark.parametrize("name, parameters", PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(name, parameters):
    flags = load_toml(ROOT / f"configs/{name}.toml")
    fields = {field.name: flags.get(field.name.replace("_", "-")) for field in FIELDS}
    model = TransformerConfig(**{key: value for key, value in fields.items() if value is not None})
    assert sum(math.prod(tensor.shape) for tensor in qwen3.tensors(model)) == parameters
