"""Which source lines a reader is shown, and how they are written."""

from pathlib import Path

import jax
import pytest

from jaxckpt import sources
from jaxckpt.sources import is_machinery, shown

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "path, machinery",
    [
        ("/home/me/code/train.py", False),
        ("/home/me/jaxckpt/jaxckpt/models/transformer.py", False),
        ("/home/me/jaxckpt/experiments/training/step.py", False),
        ("/env/lib/python3.11/site-packages/jaxckpt/models/loss.py", False),
        ("/env/lib/python3.11/site-packages/jaxckpt/linen.py", True),
        ("/home/me/jaxckpt/jaxckpt/transforms/rows.py", True),
        ("C:\\me\\jaxckpt\\nnx.py", True),
        ("/home/me/jaxckpt/.venv/lib/python3.11/site-packages/jax/_src/api.py", True),
        ("/env/lib/python3.11/site-packages/flax/linen/linear.py", True),
        ("/usr/lib/python3.11/functools.py", True),
        ("<string>", True),
    ],
)
def test_what_called_machinery_is_shown(path, machinery):
    assert is_machinery(path) == machinery


def test_a_path_is_shown_as_it_is_found_from_here(monkeypatch, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert shown(f"{tmp_path}/code/mine.py:3") == "code/mine.py:3"
    monkeypatch.chdir(ROOT)
    assert shown(f"{tmp_path}/code/mine.py:3") == f"{tmp_path}/code/mine.py:3"
    (tmp_path / "code/mine.py").unlink()
    assert shown(f"{tmp_path}/code/mine.py:3") == ""
    assert shown("") == ""


def test_another_checkouts_file_is_shown_as_this_ones(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = "jaxckpt/models/transformer.py:88"
    assert shown(f"/somewhere/else/{line}") == line
    monkeypatch.setattr(sources, "_ROOT", tmp_path)
    assert shown(f"/somewhere/else/{line}") == ""


@pytest.mark.slow
def test_a_default_run_names_lines_of_the_model():
    from experiments.config import TrainConfig
    from experiments.training.build import build
    from jaxckpt.memory.measure import compile_step
    from jaxckpt.models.config import TransformerConfig

    model = TransformerConfig(num_blocks=4, d_model=32, num_heads=2, num_kv_heads=1, head_dim=16)
    config = TrainConfig(model=model, batch_size=2, seq_len=64, remat="sqrt")
    assert jax.config.jax_compilation_cache_dir is None  # what is read from one names no buffers
    _, report = compile_step(build(config, "local"))
    files = {one.source.rpartition(":")[0] for one in report.buffers}
    assert files and not any(is_machinery(file) for file in files if file)
    assert any("/jaxckpt/models/" in file for file in files), files
