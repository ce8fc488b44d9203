"""Where text comes from, how it is split, and what every wrong path is told."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import Batches, DataError, check_corpus, load_corpus, validation_batches
from experiments.data.sources import standard_library

ROOT = Path(__file__).parents[2]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return folder


FILES = {f"f{index:02}.txt": bytes([65 + index]) * 50 for index in range(20)}


def test_no_jax_is_needed():
    code = "import sys, experiments.data; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_default_is_the_standard_library_without_tests_and_packages():
    names = [file.name for file in standard_library()]
    assert names == sorted(names) and "ast.py" in names and "json/decoder.py" in names
    for part in ("test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__"):
        assert not any(part in name.split("/") for name in names)
    corpus = load_corpus(None)
    assert corpus.num_tokens > 5_000_000 and corpus.train.max() < 256
    assert 0.03 < len(corpus.validation) / corpus.num_tokens < 0.3
    assert corpus.sha256 == load_corpus(None).sha256


def test_one_file_is_split_by_position(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 900 + b"y" * 100)
    corpus = load_corpus(str(path))
    assert bytes(corpus.train) == b"x" * 900
    assert bytes(corpus.validation) == b"y" * 100


def test_a_folder_is_split_by_file_and_skips_what_is_not_text(tmp_path):
    extra = {".hidden/x.txt": b"h" * 50, "b.bin2": b"\0" * 50, "empty.txt": b""}
    corpus = load_corpus(str(write(tmp_path, {**FILES, **extra})))
    assert corpus.num_files == 20 and corpus.skipped_files == 3
    train, validation = set(bytes(corpus.train)), set(bytes(corpus.validation))
    assert train & validation == {ord("\n")}
    assert len(validation) == 3 and len(train) == 19
    assert ord("h") not in train | validation
    assert "3 skipped" in corpus.summary


def test_a_glob_names_files(tmp_path):
    write(tmp_path, {**FILES, "sub/x.py": b"p" * 50, "sub/deep/y.py": b"q" * 50})
    assert load_corpus(f"{tmp_path}/**/*.py").num_files == 2
    assert load_corpus(f"{tmp_path}/f0*.txt").num_files == 10


def test_hash_sees_content_names_and_boundaries(tmp_path):
    texts = [
        {"a": b"xy" * 50, "b": b"z" * 50},
        {"a": b"xy" * 50 + b"z", "b": b"z" * 49},
        {"a": b"xy" * 50, "c": b"z" * 50},
        {"a": b"yx" * 50, "b": b"z" * 50},
    ]
    folders = [write(tmp_path / str(i), files) for i, files in enumerate(texts)]
    assert len({load_corpus(str(folder)).sha256 for folder in folders}) == 4


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_token_files_stay_on_disk(dtype, suffix, tmp_path):
    tokens = np.arange(1000, dtype=dtype) + (70_000 if dtype == "uint32" else 0)
    path = tmp_path / f"t{suffix}"
    np.save(path, tokens) if suffix == ".npy" else path.write_bytes(tokens.tobytes())
    corpus = load_corpus(str(path), token_dtype=dtype)
    assert isinstance(corpus.train, np.memmap) and len(corpus.train) == 900
    assert corpus.validation[-1] == tokens[-1]
    check_corpus(corpus, seq_len=99, vocab_size=int(tokens.max()) + 1)
    with pytest.raises(DataError, match=rf"has token {tokens.max()}, .*--vocab-size"):
        check_corpus(corpus, seq_len=99, vocab_size=int(tokens.max()))
    with pytest.raises(DataError, match=r"validation part has 100 tokens.*needs 101"):
        check_corpus(corpus, seq_len=100, vocab_size=1 << 20)


WRONG_TOKENS = [
    ("a.npy", b"not numpy at all", "is not a readable .npy"),
    ("a.npy", b"\x93NUMPY\x01\x00", "is not a readable .npy"),
    ("a.npy", b"", "is empty"),
    ("a.bin", b"abc", "not a multiple of the 2 bytes of uint16"),
    ("a.bin", b"", "is empty"),
]


@pytest.mark.parametrize("name, content, message", WRONG_TOKENS)
def test_wrong_token_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_corpus(str(tmp_path / name))


@pytest.mark.parametrize(
    "array", [np.zeros((3, 3), np.uint16), np.zeros(9), np.zeros(0, np.uint16)]
)
def test_arrays_that_are_no_tokens(array, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=r"uint16 or uint32 is needed|is empty"):
        load_corpus(str(tmp_path / "a.npy"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("f00.tx", r"no such file or folder \(did you mean 'f00.txt'\?\)"),
        ("*.rs", "matches no file"),
        ("none.npy", "no such file or folder"),
        ("hollow", "holds no text file"),
    ],
)
def test_wrong_paths(name, message, tmp_path):
    write(tmp_path, FILES)
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match=message):
        load_corpus(str(tmp_path / name))


TOKENS = np.arange(5000, dtype=np.uint16)


def batches(**changes) -> Batches:
    return Batches(**{"tokens": TOKENS, "batch_size": 8, "seq_len": 16, "seed": 0, **changes})


def test_a_batch_is_windows_and_a_function_of_its_step():
    batch = batches().at(3)
    assert batch.shape == (8, 17) and batch.dtype == np.int32
    assert (np.diff(batch, axis=1) == 1).all()
    np.testing.assert_array_equal(batch, batches().at(3))
    for other in (batches().at(4), batches(seed=1).at(3)):
        assert (other[:, 0] != batch[:, 0]).all()


def test_rows_of_a_batch_are_read_alone():
    whole = batches().at(5)
    np.testing.assert_array_equal(batches().at(5, 2, 5), whole[2:5])


@given(step=st.integers(0, 10**9), parts=st.sampled_from([1, 2, 4]))
def test_a_batch_in_parts_has_the_same_rows(step, parts):
    small = batches(batch_size=8 // parts)
    pieces = [small.at(step * parts + part) for part in range(parts)]
    np.testing.assert_array_equal(np.concatenate(pieces), batches().at(step))


@given(length=st.integers(18, 400), seq_len=st.integers(1, 17), seed=st.integers(0, 2**31))
def test_windows_stay_inside(length, seq_len, seed):
    made = batches(tokens=TOKENS[:length], seq_len=seq_len, seed=seed, batch_size=64).at(0)
    assert made.min() >= 0 and made.max() < length


def test_every_window_is_reached_about_as_often():
    starts = np.concatenate(
        [batches(tokens=TOKENS[:26], seq_len=15).at(s)[:, 0] for s in range(500)]
    )
    counts = np.bincount(starts, minlength=11)
    assert len(counts) == 11 and counts.min() > 250


def test_validation_is_fixed_and_spread():
    made = validation_batches(TOKENS, batch_size=4, seq_len=16, max_batches=8)
    assert len(made) == 8 and made[0].shape == (4, 17)
    starts = np.concatenate([batch[:, 0] for batch in made])
    assert starts[0] == 0 and starts[-1] == 5000 - 17
    assert (np.diff(starts) > 17).all()
    (short,) = validation_batches(TOKENS[:40], batch_size=4, seq_len=16, max_batches=8)
    np.testing.assert_array_equal(short[:2, 0], [0, 40 - 17])
    assert (short[2:] == -1).all(), "the text has two rows, and none comes twice"
