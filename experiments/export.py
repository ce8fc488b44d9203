"""Write a run's weights as Hugging Face's transformers loads them.

python -m experiments.export runs/tuned -o tuned-hf
python -m experiments.export runs/tuned -o tuned-hf --step 400 --dtype f32
"""

import contextlib
import dataclasses
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter

from experiments.cli import main
from experiments.config import ConfigError, RunError, load_toml
from experiments.files import reason
from experiments.training.record import CONFIG
from experiments.weights.load import CONFIG_JSON, read_shape
from experiments.weights.shards import import_safetensors, read_json, write_shards
from jaxckpt.models import qwen3
from jaxckpt.models.config import ModelError, TransformerConfig
from jaxckpt.plans.errors import nearest

_DTYPES = {"bf16": "bfloat16", "f32": "float32"}
# Files that lie beside weights and do not change by training.
_COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)


def export(
    run: Annotated[Path, Parameter(help="Folder of a run of experiments.train.")],
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"), help="Folder to make.")],
    step: Annotated[int | None, Parameter(help="Checkpoint; by default the last.")] = None,
    dtype: Annotated[Literal["bf16", "f32"], Parameter(help="Dtype of the tensors.")] = "bf16",
    shard_gb: Annotated[float, Parameter(help="Largest size of a file, in 1e9 bytes.")] = 5.0,
):
    """Write a run's weights as safetensors, with config.json and the tokenizer it started with."""
    model, init, seq_len = _read_run(run)
    step = _choose_step(run, step)
    if not shard_gb > 0:
        raise ConfigError(f"shard-gb is {shard_gb}; it is above 0, such as 5")
    _check_out(out)
    import_safetensors()
    content = _config_json(model, init, seq_len, _DTYPES[dtype])
    try:
        with _whole(out) as folder, _parameters(run, step) as read:
            (folder / CONFIG_JSON).write_text(json.dumps(content, indent=2) + "\n")
            beside: Any = init
            copied = [name for name in _COPIED if beside and (beside / name).is_file()]
            for name in copied:
                shutil.copyfile(beside / name, folder / name)
            tensors = _tensors(model, read, _DTYPES[dtype])
            written = write_shards(folder, tensors, largest_bytes=int(shard_gb * 1e9))
    except OSError as error:
        raise RunError(f"cannot write {out}: {reason(error)}") from None
    others = ", ".join(copied) or "no tokenizer: the run started with none"
    print(f"step {step} of {run} is in {out}: {written} in {dtype}; {others}")


def _config_json(
    model: TransformerConfig, init: Path | None, seq_len: int, dtype: str
) -> dict[str, Any]:
    """Returns the new `config.json`, with the keys of the folder that the run started from."""
    try:
        own = qwen3.config_json(model, dtype=dtype, max_positions=seq_len)
    except ModelError as error:
        raise ConfigError(f"the run's model is no Qwen3: {error}") from None
    if init is None:
        return own
    if qwen3.shape(read_shape(init)) != qwen3.shape(model):
        raise ConfigError(f"{init} is no longer the model that the run started from")
    return {**own, **read_json(init / CONFIG_JSON), "torch_dtype": dtype, "dtype": dtype}


def _read_run(run: Path) -> tuple[TransformerConfig, Path | None, int]:
    """Returns a run's model, the folder that it started from, and its tokens per sequence."""
    if not run.is_dir():
        names = [path.name for path in run.parent.glob("*") if path.is_dir()]
        raise ConfigError(
            f"{str(run)!r} is no folder of a run{nearest(run.name, names)}; experiments.train with "
            "--save-every and --out makes one"
        )
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{str(run)!r} holds no run of experiments.train: no {CONFIG} in it")
    flags = load_toml(run / CONFIG)
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    given = {flag.replace("-", "_"): value for flag, value in flags.items()}
    try:
        model = TransformerConfig(**{name: given[name] for name in names & given.keys()})
    except ModelError as error:
        raise ConfigError(f"{run / CONFIG}: {error}") from None
    return model, Path(given["init"]) if "init" in given else None, given["seq_len"]


def _choose_step(run: Path, step: int | None) -> int:
    """Returns the given step, or the last; Orbax names a folder by its step once it is complete."""
    folder = run / "checkpoints"
    there = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())
    if not there:
        raise ConfigError(
            f"{folder} holds no checkpoint; a run of experiments.train saves some with --save-every"
        )
    if step is not None and step not in there:
        raise ConfigError(f"{folder} has no step {step}; there are: {', '.join(map(str, there))}")
    return there[-1] if step is None else step


def _check_out(out: Path):
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {str(out)!r}: there is no folder {out.parent}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {str(out)!r} is there already; name another folder")


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `out` at the end, or removed on an error."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        yield folder
        folder.chmod(0o755)  # only the owner may read a temporary folder
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _parameters(run: Path, step: int) -> Iterator[Callable[[tuple[str, ...]], np.ndarray]]:
    """Yields a function that reads a parameter by its path."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and a GPU may be busy
    from experiments.training.checkpoints import Checkpoints

    with contextlib.closing(Checkpoints(run, keep=1)) as checkpoints:
        yield lambda path: checkpoints.parameter(step, path)


def _tensors(model: TransformerConfig, read, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor by its name; one parameter of the run is in memory at a time."""
    for path, tensors in itertools.groupby(qwen3.tensors(model), key=lambda tensor: tensor.path):
        value = read(path)
        for tensor in tensors:
            row = value if tensor.block is None else value[tensor.block]
            row = row.T if tensor.transposed else row
            yield tensor.name, np.ascontiguousarray(row.astype(dtype))


if __name__ == "__main__":
    main(export)
