"""Weights that come in go out: byte for byte, whole or not at all."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import export as export_module
from experiments.cli import main
from experiments.export import export
from experiments.weights.shards import Shards, write_shards
from tests.experiments import hf_folders, runs

pytestmark = pytest.mark.slow

TEXT = "def import self: return the of and in for\n" * 200


def call(*flags, capsys) -> tuple[int, str]:
    """Runs the command line in this process; returns its exit code and the last line printed."""
    capsys.readouterr()
    code = 0
    try:
        main(export, list(map(str, flags)))
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert (code == 0) == (err == "") and (err + out).count("\n") == 1, (out, err)
    return code, err + out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder of weights, and a run on it whose one step changes nothing."""
    base = tmp_path_factory.mktemp("tuned")
    tensors = hf_folders.write(base / "hf", files=2)
    hf_folders.write_tokenizer(base / "hf")
    (base / "hf/generation_config.json").write_text('{"eos_token_id": 0}')
    (base / "text.txt").write_text(TEXT)
    flags = (f"--init={base / 'hf'}", f"--data={base / 'text.txt'}", "--learning-rate=0")
    flags += ("--steps=2", "--save-every=1", "--sample", "--remat=none", f"--out={base / 'run'}")
    shape = ("--num-blocks=3", "--d-model=16", "--num-heads=2", "--num-kv-heads=1")
    text = runs.train(*flags, *shape, "--dropout=0", cache=base / "cache")
    return base, tensors, text


def test_text_goes_through_the_folders_tokenizer(tuned):
    base, _, text = tuned
    found = re.search(r"([\d,]+) training and ([\d,]+) validation tokens", text)
    count = sum(int(number.replace(",", "")) for number in found.groups())
    assert f"tokens of {base / 'hf/tokenizer.json'}" in text and count < len(TEXT) / 2
    prompt = text.split("the model goes on after the bar ---\n")[1].split("|")[0]
    assert prompt and prompt in TEXT


def test_what_came_in_goes_out(tuned, tmp_path, capsys):
    base, tensors, _ = tuned
    code, line = call(base / "run", "-o", tmp_path / "out", capsys=capsys)
    assert code == 0 and "step 2 of" in line and f"{len(tensors)} tensors" in line, line
    shards = Shards(tmp_path / "out")
    assert shards.shapes.keys() == tensors.keys()
    for name, value in tensors.items():
        assert shards.tensor(name).dtype == value.dtype
        assert shards.tensor(name).tobytes() == value.tobytes(), name
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / "hf" / name).read_bytes()
    before = json.loads((base / "hf/config.json").read_text())
    assert before.items() <= json.loads((tmp_path / "out/config.json").read_text()).items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_shards_of_a_step_in_float32(tuned, tmp_path, capsys):
    base, tensors, _ = tuned
    flags = ("--step=1", "--dtype=f32", "--shard-gb=1e-5")
    code, line = call(base / "run", "-o", tmp_path / "out", *flags, capsys=capsys)
    shards = Shards(tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert code == 0 and len(files) > 2 and f"{len(files)} files in f32" in line, line
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for name, value in tensors.items():
        np.testing.assert_array_equal(shards.tensor(name), value.astype(np.float32))
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"


def test_a_file_holds_what_fits_and_a_large_tensor_has_its_own(tmp_path):
    sizes = {"a": 3, "b": 3, "c": 9, "d": 3}
    tensors = {name: np.full(size, 7, np.float32) for name, size in sizes.items()}
    write_shards(tmp_path, tensors.items(), largest_bytes=6 * 4)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    numbers = {name: int(file[6:11]) for name, file in index["weight_map"].items()}
    assert numbers == {"a": 1, "b": 1, "c": 2, "d": 3}
    assert index["metadata"] == {"total_size": 18 * 4}


def test_a_failing_disk_leaves_nothing(tuned, tmp_path, capsys, monkeypatch):
    def full(folder, *_, **__):
        (folder / "0").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_shards", full)
    code, line = call(tuned[0] / "run", "-o", tmp_path / "out", capsys=capsys)
    assert code == 1 and "No space left on device" in line and not list(tmp_path.iterdir())


def without_checkpoints(run: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.toml").write_text((run / "config.toml").read_text())
    return folder


def test_what_cannot_be_exported(tuned, tmp_path, capsys):
    run = tuned[0] / "run"
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    bare = without_checkpoints(run, tmp_path / "bare")
    other = without_checkpoints(run, tmp_path / "other")
    (other / "checkpoints/5").mkdir(parents=True)
    plain = without_checkpoints(run, tmp_path / "plain")
    (plain / "checkpoints/5").mkdir(parents=True)
    text = re.sub(r"^init = .*$", "", (plain / "config.toml").read_text(), flags=re.MULTILINE)
    (plain / "config.toml").write_text(text.replace("qk_norm = true", "qk_norm = false"))
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    cases = [
        ((tuned[0] / "ran", "-o", out), "is no folder of a run (did you mean 'run'?)"),
        ((tmp_path / "full", "-o", out), "no config.toml in it"),
        ((bare, "-o", out), "holds no checkpoint"),
        ((run, "-o", out, "--step=7"), "has no step 7; there are: 1, 2"),
        ((run, "-o", out, "--dtype=bf17"), 'Did you mean "bf16"?'),
        ((run, "-o", out, "--shard-gb=0"), "shard-gb is 0.0; it is above 0"),
        ((run, "-o", tmp_path / "full"), "is there already"),
        ((run, "-o", tmp_path / "no/out"), "there is no folder"),
        ((run,), "-o"),
        ((other, "-o", out), "checkpoint 5 in"),
        ((plain, "-o", out), "is no Qwen3: qk_norm is false"),
    ]
    for flags, message in cases:
        code, line = call(*flags, capsys=capsys)
        assert code == 2 and line.startswith("error: ") and message in line, line
    assert sorted(tmp_path.rglob("*")) == before
