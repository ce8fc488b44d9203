"""Tiny random Qwen3 folders in the layout of transformers, for tests; made without it."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxckpt.models import TransformerConfig, qwen3

CONFIG = TransformerConfig(
    vocab_size=300, num_blocks=3, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32
)
# What a run on it is given beside --init.
FLAGS = ("--batch-size=2", "--seq-len=16", "--validation-batches=1", "--remat=full")


def random_tensors(config: TransformerConfig, dtype) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        tensor.name: (0.1 * rng.standard_normal(tensor.shape)).astype(dtype)
        for tensor in qwen3.tensors(config)
    }


def write(
    folder: Path,
    config: TransformerConfig = CONFIG,
    *,
    dtype=ml_dtypes.bfloat16,
    tensors: dict[str, np.ndarray] | None = None,
    files: int = 1,
    **changes,
) -> dict[str, np.ndarray]:
    """Writes a folder; returns its tensors. `changes` are of `config.json`; None removes a key."""
    folder.mkdir(parents=True, exist_ok=True)
    content = qwen3.config_json(config, dtype=np.dtype(dtype).name, max_positions=64) | changes
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    tensors = random_tensors(config, dtype) if tensors is None else tensors
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    if files == 1:
        names = ["model.safetensors"]
    weight_map = {name: names[index % files] for index, name in enumerate(tensors)}
    for name in names:
        part = {key: value for key, value in tensors.items() if weight_map[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def write_tokenizer(folder: Path, vocab_size: int = 280):
    """Writes a byte-level BPE with a few merges, as Qwen's is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["import the of and return self def in for " * 20], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
