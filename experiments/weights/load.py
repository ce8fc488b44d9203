"""Weights to start from: `--init DIR`, a folder as Hugging Face's transformers saves a Qwen3.

`config.json` gives the model's shape, the safetensors files its parameters. `tokenizer.json`, if it
exists, turns text into tokens. Only `load_params` needs JAX, so a fault of a folder is found before
JAX is imported.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import ConfigError, TrainConfig
from experiments.data.tokenizer import TOKENIZER_JSON, Tokenizer
from experiments.weights.shards import DTYPES, Shards, listed, read_json
from jaxckpt.models import qwen3
from jaxckpt.models.config import ModelError, TransformerConfig
from jaxckpt.plans.errors import nearest

CONFIG_JSON = "config.json"
_COMPARED_ROWS = 4096


def read_shape(folder: Path) -> TransformerConfig:
    """Returns the shape of a folder's model.

    Raises:
      ConfigError: The folder or its `config.json` is missing, or is not of a Qwen3.
    """
    if not folder.is_dir():
        beside = folder.parent if folder.parent.is_dir() else Path()
        names = [path.name for path in beside.iterdir() if path.is_dir()]
        raise ConfigError(
            f"--init {str(folder)!r} is no folder{nearest(folder.name, names)}; "
            "`hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B` makes one"
        )
    path = folder / CONFIG_JSON
    content = read_json(path)
    try:
        return qwen3.config_of(content)
    except ModelError as error:
        raise ConfigError(f"{path}: {error}") from None


def shape_flags(folder: Path) -> dict[str, Any]:
    """Returns the flags of a folder's `config.json`, as `{"d-model": 1024, ...}`."""
    fields = qwen3.shape(read_shape(folder))
    return {name.replace("_", "-"): value for name, value in fields.items()}


def check_shape(config: TrainConfig):
    """Raises `ConfigError` if a run's model differs from the model that it starts from."""
    if config.init is None:
        return
    given, found = map(qwen3.shape, (config.model, read_shape(config.init)))
    different = [
        f"{name} is {value!r}, there {found[name]!r}"
        for name, value in given.items()
        if value != found[name]
    ]
    if different:
        raise ConfigError(
            f"the model is not that of {config.init / CONFIG_JSON}: {'; '.join(different)}; that "
            "file sets these, leave them out"
        )


def check_init(config: TrainConfig) -> Tokenizer | None:
    """Returns the tokenizer of the folder that a run starts from; None without one.

    The folder's shape, weights and tokenizer are checked; the weights not if the run is resumed.

    Raises:
      ConfigError: A part of the folder is missing, or does not fit the model.
    """
    if config.init is None:
        return None
    check_shape(config)
    if not config.resume:
        check_weights(config.init, config.model)
    path = config.init / TOKENIZER_JSON
    if not path.exists():
        return None
    tokenizer = Tokenizer(path)
    if tokenizer.largest_token >= config.model.vocab_size:
        raise ConfigError(
            f"{path} has token {tokenizer.largest_token}, the model's vocabulary ends at "
            f"{config.model.vocab_size - 1}"
        )
    return tokenizer


def end_token(config: TrainConfig) -> int | None:
    """Returns the token that ends a document, by a flag or by `config.json`; None if unknown."""
    if config.end_token is not None or config.init is None:
        return config.end_token
    found = read_json(config.init / CONFIG_JSON).get("eos_token_id")
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, int) else None


def check_weights(folder: Path, model: TransformerConfig):
    """Raises unless a folder's tensors fit a model.

    Raises:
      ConfigError: A tensor is missing, is not of this model, or has another shape or dtype. The
        text names all such tensors.
    """
    shards = Shards(folder)
    wanted = {tensor.name: tensor.shape for tensor in qwen3.tensors(model)}
    missing = [name for name in wanted if name not in shards.shapes]
    extra = sorted(name for name in shards.shapes if name not in wanted)
    if model.tied_embeddings and qwen3.HEAD in extra and not missing:
        extra.remove(qwen3.HEAD)
        _check_tied(shards, folder)
    problems = [f"missing: {listed(missing)}"] if missing else []
    problems += [f"not of this model: {listed(extra)}"] if extra else []
    there = [name for name in wanted if name in shards.shapes]
    for has, group in _grouped(there, lambda name: (shards.shapes[name], wanted[name])):
        if has[0] != has[1]:
            problems.append(f"of shape {list(has[0])}, needed {list(has[1])}: {listed(group)}")
    for dtype, group in _grouped(there, lambda name: shards.dtypes[name]):
        if dtype not in DTYPES:
            problems.append(f"of dtype {dtype}, needed {' or '.join(DTYPES)}: {listed(group)}")
    if problems:
        raise ConfigError(
            f"the tensors in {folder} do not fit {CONFIG_JSON}; {'; '.join(problems)}"
        )


def _grouped(names: list[str], key):
    """Yields each value of `key` and the names that have it."""
    for value, group in itertools.groupby(sorted(names, key=key), key=key):
        yield value, list(group)


def _check_tied(shards: Shards, folder: Path):
    """Raises unless a head that is saved beside tied embeddings equals them."""
    rows = shards.shapes[qwen3.EMBEDDING][0]
    same = shards.shapes[qwen3.HEAD] == shards.shapes[qwen3.EMBEDDING] and all(
        np.array_equal(
            shards.rows(qwen3.HEAD, start, start + _COMPARED_ROWS),
            shards.rows(qwen3.EMBEDDING, start, start + _COMPARED_ROWS),
        )
        for start in range(0, rows, _COMPARED_ROWS)
    )
    if not same:
        raise ConfigError(
            f"{folder} ties its embeddings, but {qwen3.HEAD} is not {qwen3.EMBEDDING}; set "
            f"tie_word_embeddings to false in {CONFIG_JSON}"
        )


def load_params(folder: Path, like):
    """Returns the parameters of a folder that `check_weights` has passed.

    One parameter at a time is made on the host and copied to the device: each tensor is read from
    its memory-mapped file into its row of the stack. The parameters get the dtypes and shardings of
    `like`, the abstract parameters.
    """
    import jax
    from flax import traverse_util

    from experiments.training.mesh import put_whole

    leaves: dict[Any, Any] = traverse_util.flatten_dict(like)
    shards = Shards(folder)
    model = read_shape(folder)
    found = {}
    for path, tensors in itertools.groupby(qwen3.tensors(model), key=lambda tensor: tensor.path):
        made = np.empty(leaves[path].shape, leaves[path].dtype)
        for tensor in tensors:
            value = shards.tensor(tensor.name)
            row = made if tensor.block is None else made[tensor.block]
            row[...] = value.T if tensor.transposed else value
        where = leaves[path].sharding
        found[path] = jax.device_put(made) if where is None else put_whole(made, where)
    return traverse_util.unflatten_dict(found)
