"""Packed training: the loss is that of the documents alone, and a run goes on where it stopped."""

import dataclasses
import functools
import json

import jax
import numpy as np
import optax
import pytest

from experiments.cli import main
from experiments.config import OptimizerConfig, TrainConfig
from experiments.data import (
    PackedRows,
    load_corpus,
    packed_validation_batches,
    validation_batches,
)
from experiments.train import train
from experiments.training.loop import run
from experiments.training.step import init_state, make_train_step, make_validation_step
from jaxckpt.models import Transformer, TransformerConfig, next_token_loss
from tests.experiments import runs
from tests.experiments.packing import join
from tests.transforms.cases import relative_error

pytestmark = pytest.mark.slow

MODEL = TransformerConfig(
    num_blocks=2, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32, dtype="f32"
)
CONFIG = TrainConfig(
    model=MODEL,
    optimizer=OptimizerConfig(kind="sgd", clip_norm=1e9),
    pack=True,
    batch_size=4,
    seq_len=24,
    steps=4,
)
LENGTHS = (9, 16, 3, 24, 1, 11, 10, 22, 4)  # of 100 tokens; 4 rows of 24, and of the last target


def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens, starts = join([rng.integers(0, 256, n).astype(np.uint32) for n in LENGTHS])
    rows = PackedRows(tokens=tokens, starts=starts, seq_len=24)
    return tuple(map(np.stack, zip(*(rows[row] for row in range(4)), strict=True)))


def apart() -> tuple[np.ndarray, np.ndarray]:
    """Returns the batch's documents, a row each: inputs and targets, padded behind the end."""
    tokens, ids = batch()
    found = [
        row[places == document]
        for row, places in zip(tokens, ids, strict=True)
        for document in range(places[-1] + 1)
    ]
    padded = np.full([len(found), 26], -1)
    for row, document in zip(padded, found, strict=True):
        row[: len(document)] = document
    return np.maximum(padded[:, :-1], 0), padded[:, 1:]


def expected(params):
    inputs, targets = apart()

    def loss(params):
        x = Transformer(MODEL, remat="none").apply({"params": params}, inputs, method="features")
        return next_token_loss(x, params, targets, MODEL, ignore_index=-1)

    return jax.jit(jax.value_and_grad(loss))(params), int((targets != -1).sum())


@functools.cache
def validate():
    return jax.jit(make_validation_step(CONFIG))


@functools.cache
def first_state():
    return jax.jit(lambda: init_state(CONFIG))()


def gradients_of(state):
    is_trace = lambda x: isinstance(x, optax.TraceState)
    return next(filter(is_trace, jax.tree.leaves(state.optimizer, is_leaf=is_trace))).trace


def test_a_packed_batch_is_its_documents_alone():
    """In two parts, which have different numbers of targets."""
    config = dataclasses.replace(CONFIG, remat="sqrt", accumulate=2)
    params = first_state().params
    want, count = expected(params)
    after, metrics = jax.jit(make_train_step(config))(first_state(), batch())
    assert relative_error((metrics["loss"], gradients_of(after)), want) < 1e-5
    loss, counted = validate()(params, batch())
    np.testing.assert_allclose(loss, want[0], rtol=1e-6)
    assert counted == count < 4 * 24
    # The twin: one document a row is something else.
    tokens, ids = batch()
    loss, counted = validate()(params, (tokens, 0 * ids))
    assert counted == 4 * 24 and abs(loss - want[0]) > 1e-4


def test_a_validation_counts_each_row_once():
    """Two rows in batches of four: the mean is that of the two, packed or not."""
    tokens = np.random.default_rng(0).integers(0, 256, 52)
    rows = PackedRows(tokens=tokens[:49], starts=np.array([0, 7, 30]), seq_len=24)
    params = first_state().params
    of_rows = [validate()(params, tuple(part[None] for part in rows[row])) for row in (0, 1)]
    (short,) = packed_validation_batches(rows, batch_size=4, max_batches=3)
    loss, count = validate()(params, short)
    assert count == sum(count for _, count in of_rows) == 2 * 24 - 2
    want = sum(loss * count for loss, count in of_rows) / count
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    plain = jax.jit(make_validation_step(dataclasses.replace(CONFIG, pack=False)))
    windows = validation_batches(tokens, batch_size=1, seq_len=24, max_batches=9)
    (short,) = validation_batches(tokens, batch_size=4, seq_len=24, max_batches=9)
    loss, count = plain(params, short)
    assert count == 2 * 24 and len(windows) == 2
    want = np.mean([plain(params, window)[0] for window in windows])
    np.testing.assert_allclose(loss, want, rtol=1e-6)


def test_a_batch_whose_documents_have_one_token_has_no_loss():
    tokens = np.zeros([4, 25], np.int32)
    ids = np.broadcast_to(np.arange(25, dtype=np.int32), [4, 25])
    loss, count = validate()(first_state().params, (tokens, ids))
    assert loss == 0 and count == 0


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 256, rng.integers(1, 60)).tolist() for _ in range(120)]
    path.write_text("".join(json.dumps({"tokens": document}) + "\n" for document in documents))
    return path


def test_a_run_that_goes_on_sees_the_same_batches(lines, tmp_path):
    corpus = load_corpus(str(lines), pack=True)
    config = dataclasses.replace(
        CONFIG,
        remat="none",
        optimizer=OptimizerConfig(decay_steps=4),
        save_every=1,
        compile_cache=tmp_path / "cache",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    run(dataclasses.replace(config, out=whole), corpus, whole)
    run(dataclasses.replace(config, out=parts, steps=2), corpus, parts)
    run(dataclasses.replace(config, out=parts, resume=True), corpus, parts)
    kept = [row for row in runs.losses(parts) if row[0] != 2 or row in runs.losses(whole)]
    assert kept == runs.losses(whole) and len({loss for _, loss in kept}) == len(kept)
    (step, state), (_, want) = runs.checkpoint(parts), runs.checkpoint(whole)
    assert step == 4 and all((state[name] == want[name]).all() for name in want)


@pytest.mark.heavy
def test_a_killed_run_goes_on_bit_equal(lines, tmp_path):
    flags = ("--steps=12", "--save-every=1", "--pack", f"--data={lines}")
    runs.train(*flags, f"--out={tmp_path / 'whole'}", cache=tmp_path / "cache")
    folder = tmp_path / "run"
    process = runs.start(*flags, f"--out={folder}", cache=tmp_path / "cache")
    saved = lambda: any(path.name.isdigit() for path in (folder / "checkpoints").glob("*"))
    runs.wait_for(process, saved)
    runs.kill(process)
    runs.train(*flags, f"--out={folder}", "--resume", cache=tmp_path / "cache")
    assert any("resumed_from_step" in row for row in runs.rows(folder))
    runs.assert_same_end(folder, tmp_path / "whole")


REFUSED = [
    (["--pack", "--data={bad}"], "x.jsonl, line 2: Expecting"),
    (["--data={lines}"], "is JSON Lines; --pack reads its documents"),
    (["--pack", "--data={lines}", "--seq-len=5000"], "a window of --seq-len 5000 needs 5001"),
    (["--end-token=3"], "end_token is 3; it is a token id, and needs --pack"),
    (["--pack", "--end-token=256"], "has token 256, the model's vocabulary ends at 255"),
]


@pytest.mark.parametrize("flags, message", REFUSED)
def test_refused_command_lines(flags, message, lines, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{text}\n')
    flags = [flag.format(bad=tmp_path / "x.jsonl", lines=lines) for flag in flags]
    with pytest.raises(SystemExit) as caught:
        main(train, [*flags, f"--out={tmp_path / 'run'}"])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_a_missing_grain_is_told_before_jax_is_imported(monkeypatch, capsys, lines):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(train, ["--pack", f"--data={lines}"])
    assert "--pack needs the package grain: pip install -e '.[train]'" in capsys.readouterr().err
