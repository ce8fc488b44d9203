"""Text and token files at their edges: damaged, huge, hidden, oddly named, or too short."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import experiments.data.corpus as corpus_module
from experiments.data import Batches, DataError, check_corpus, load_corpus, validation_batches

ROOT = Path(__file__).parents[2]


def _folder(root: Path, **texts: str) -> str:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text)
    return str(root)


def _text(tokens: np.ndarray) -> bytes:
    return np.asarray(tokens, np.uint8).tobytes()


def _numbered(count: int) -> dict[str, str]:
    return {f"f{index:03}": f"<{index:03}>" for index in range(count)}


def test_the_default_holds_real_sources_without_tests_and_packages():
    corpus = load_corpus(None)
    text = _text(corpus.train) + _text(corpus.validation)
    root = Path(sysconfig.get_paths()["stdlib"])
    assert (root / "dataclasses.py").read_bytes() in text
    for left_out in (Path(np.__file__), root / "test/support/__init__.py"):
        if left_out.exists():
            assert left_out.read_bytes() not in text
    records = list(root.glob("_sysconfigdata_*.py"))
    assert not any(record.read_bytes() in text for record in records)


@pytest.mark.parametrize("count", [2, 9, 10, 11, 40])
def test_a_folder_is_split_by_file(tmp_path, count):
    corpus = load_corpus(_folder(tmp_path / "texts", **_numbered(count)))
    parts = [re.findall(rb"<\d+>\n", _text(part)) for part in (corpus.train, corpus.validation)]
    assert sorted(parts[0] + parts[1]) == [b"<%03d>\n" % index for index in range(count)]
    assert all(part == sorted(part) for part in parts)
    assert len(parts[1]) == max(1, count // 10)
    again = load_corpus(str(tmp_path / "texts"))
    assert np.array_equal(corpus.train, again.train) and corpus.sha256 == again.sha256


def test_hidden_binary_and_empty_files_are_skipped_and_counted(tmp_path):
    where = _folder(tmp_path / "texts", a="first", b="second", empty="")
    (tmp_path / "texts/binary").write_bytes(b"ELF\0")
    (tmp_path / "texts/.hidden").write_text("hidden")
    _folder(tmp_path / "texts/.git", config="secret", head="secret")  # counts once
    corpus = load_corpus(where)
    assert _text(corpus.train) + _text(corpus.validation) == b"first\nsecond\n"
    assert (corpus.num_files, corpus.skipped_files) == (2, 4)
    assert "2 files, 4 skipped" in corpus.summary and corpus.sha256[:12] in corpus.summary


def test_of_a_binary_only_its_beginning_is_read(tmp_path):
    where = _folder(tmp_path / "texts", a="first", b="second")
    with (tmp_path / "texts/huge").open("wb") as file:
        file.truncate(1 << 40)  # a hole: takes no room on disk, and does not fit into memory
    assert load_corpus(where).skipped_files == 1


def test_a_glob_of_one_file_is_that_file(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789")
    np.save(tmp_path / "a.npy", np.arange(100, dtype=np.uint16))
    for name, pattern in (("a.txt", "*.txt"), ("a.npy", "*.npy")):
        one, matched = load_corpus(str(tmp_path / name)), load_corpus(str(tmp_path / pattern))
        assert one.sha256 == matched.sha256 and np.array_equal(one.train, matched.train)


@pytest.mark.skipif(sys.platform != "linux", reason="names of odd bytes are Linux's")
def test_a_name_need_not_be_utf8(tmp_path):
    where = _folder(tmp_path / "texts", a="first")
    Path(os.fsdecode(os.fsencode(where) + b"/\xff.txt")).write_text("second")
    assert load_corpus(where).num_files == 2


def test_the_hash_of_tokens_follows_every_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.data.tokens._CHUNK_TOKENS", 64)
    hashes = []
    for changed in (None, 0, 63, 64, 199):
        tokens = np.zeros(200, np.uint16)
        if changed is not None:
            tokens[changed] = 7
        np.save(tmp_path / "tokens.npy", tokens)
        corpus = load_corpus(str(tmp_path / "tokens.npy"))
        hashes.append(corpus.sha256)
        if changed is not None:
            with pytest.raises(DataError, match="token 7"):
                check_corpus(corpus, seq_len=8, vocab_size=7)
    assert len(set(hashes)) == len(hashes)


def _refused(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_corpus(str(path), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_path_suggests_its_neighbour(tmp_path):
    _folder(tmp_path / "texts", story="once")
    np.save(tmp_path / "tokens.npy", np.arange(9, dtype=np.uint16))
    assert "did you mean 'story.txt'?" in _refused(tmp_path / "texts/stroy.txt")
    assert "did you mean 'texts'?" in _refused(tmp_path / "text/story.txt")
    assert "did you mean 'tokens.npy'?" in _refused(tmp_path / "token.npy")
    message = _refused(tmp_path / "zzzzzz")
    assert "no such file or folder; valid: a text file, a folder, a quoted glob" in message
    assert "no such file" in _refused(tmp_path / "texts/story.txt/below")


def test_text_that_is_not_there(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "binaries").mkdir()
    (tmp_path / "binaries/a").write_bytes(b"\0")
    assert "--data is empty" in _refused("")
    assert "is empty or not text" in _refused(tmp_path / "empty.txt")
    assert "holds no text file (0 skipped)" in _refused(tmp_path / "bare")
    assert "holds no text file (1 skipped)" in _refused(tmp_path / "binaries")
    assert "matches no file" in _refused(tmp_path / "*.rs")


def test_a_link_to_a_folder_is_followed_once(tmp_path):
    """Whatever the names: a folder itself comes before links to it, and no cycle is gone round."""
    _folder(tmp_path / "elsewhere/inner", a="linked")
    where = Path(_folder(tmp_path / "texts/sub", b="own")).parent
    (where / "linked").symlink_to(tmp_path / "elsewhere")
    (where / "again").symlink_to(where / "sub")  # its name is before sub's
    (where / "sub/up").symlink_to(where)
    (where / "sub/above").symlink_to(tmp_path)
    (where / "broken").symlink_to(tmp_path / "nowhere")
    corpus = load_corpus(str(where))
    assert (corpus.num_files, corpus.skipped_files) == (2, 4)
    text = _text(corpus.train) + _text(corpus.validation)
    assert sorted(text.split()) == [b"linked", b"own"]
    globbed = load_corpus(f"{where}/**/*.txt")
    assert globbed.num_files == 2 and globbed.skipped_files > 0


def test_a_split_by_files_that_holds_out_the_most_is_made_by_size(tmp_path):
    _folder(tmp_path / "a", a="small", z="x" * 500)
    corpus = load_corpus(str(tmp_path / "a"))
    assert len(corpus.validation) == corpus.num_tokens // 10 and "cut by size" in corpus.summary
    # Of eleven the tenth.
    texts = _numbered(11) | {"f009": "x" * 5000}
    corpus = load_corpus(_folder(tmp_path / "b", **texts))
    assert len(corpus.validation) == corpus.num_tokens // 10 and corpus.is_cut_by_size
    assert sorted(_text(corpus.train) + _text(corpus.validation)) == sorted(
        b"".join(text.encode() + b"\n" for text in texts.values())
    )
    even = load_corpus(_folder(tmp_path / "c", **_numbered(11)))
    assert not even.is_cut_by_size and "by size" not in even.summary


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_text_in_another_form_is_named(encoding, tmp_path):
    (tmp_path / "a.txt").write_text("中文" * 50, encoding=encoding)
    assert re.search(r"a\.txt begins with the byte order mark of UTF", _refused(tmp_path / "a.txt"))


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    hash_of = corpus_module._hash

    def hash_and_write(files, tokenizer):
        found = hash_of(files, tokenizer)
        (tmp_path / "a.txt").write_text("longer text")
        return found

    monkeypatch.setattr(corpus_module, "_hash", hash_and_write)
    assert "a.txt changed while it was read" in _refused(tmp_path / "a.txt")


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "a.txt': Permission denied" in _refused(tmp_path / "a.txt")


@pytest.mark.parametrize("kept", [0, 1, 6, 8, 50, 128, 200])
def test_a_torn_npy(tmp_path, kept):
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:kept])
    assert re.search("is empty|is not a readable .npy", _refused(path))


def test_an_archive_named_npy(tmp_path):
    with (tmp_path / "tokens.npy").open("wb") as file:
        np.savez(file, tokens=np.arange(9, dtype=np.uint16))
    assert "is not a readable .npy" in _refused(tmp_path / "tokens.npy")


def test_a_damaged_npy_header_is_refused_or_read(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(whole)
        for position in random.integers(0, 128, size=random.integers(1, 4)):
            damaged[position] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            load_corpus(str(path))
        except DataError as error:
            assert "tokens.npy" in str(error)


def test_numbers_of_another_width(tmp_path):
    path = tmp_path / "tokens.bin"
    tokens = np.arange(1000, dtype=np.uint32)
    path.write_bytes(tokens.tobytes())
    assert "every second number is 0, as in uint32" in _refused(path)
    assert len(load_corpus(str(path), token_dtype="uint32").train) == 900
    path.write_bytes((tokens + 69_000).tobytes())
    message = _refused(path, vocab_size=70_000)
    assert "is read as uint16" in message and "--token-dtype uint32" in message
    assert load_corpus(str(path), vocab_size=70_000, token_dtype="uint32").train[0] == 69_000
    # A NumPy file says its own width.
    np.save(tmp_path / "a.npy", tokens.astype(np.uint16))
    assert load_corpus(str(tmp_path / "a.npy"), vocab_size=70_000).num_tokens == 1000


def test_a_token_file_under_another_name(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1000, dtype=np.uint16))
    for name in ("a.txt", "A.NPY", "b.bin"):
        (tmp_path / name).write_bytes((tmp_path / "a.npy").read_bytes())
        assert load_corpus(str(tmp_path / name)).num_tokens == 1000
    (tmp_path / "C.BIN").write_bytes(np.arange(1, 1001, dtype=np.uint16).tobytes())
    assert load_corpus(str(tmp_path / "C.BIN")).num_tokens == 1000
    # In a folder they are no text, whatever bytes they have.
    folder = Path(_folder(tmp_path / "texts", a="text", b="more"))
    (folder / "d.bin").write_bytes(b"abcd")
    assert load_corpus(str(folder)).skipped_files == 1


def test_bin_of_another_size_or_type(tmp_path):
    (tmp_path / "tokens.bin").write_bytes(bytes(6))
    message = _refused(tmp_path / "tokens.bin", token_dtype="uint32")
    assert "has 6 bytes, not a multiple of the 4 bytes of uint32" in message
    message = _refused(tmp_path / "tokens.bin", token_dtype="uint23")
    assert "is 'uint23'; valid: uint16, uint32 (did you mean 'uint32'?)" in message


def _batches(length=1000, **options) -> Batches:
    made = {"batch_size": 8, "seq_len": 16, "seed": 0, **options}
    return Batches(tokens=np.arange(length, dtype=np.uint32), **made)


def test_a_batch_depends_on_seed_and_step_alone():
    first = _batches().at(3)
    assert first.dtype == np.int32 and first.shape == (8, 17)
    assert np.array_equal(first, _batches().at(3))
    assert not np.array_equal(first, _batches().at(4))
    for seed in (1, 2**70 + 5, -1):
        assert not np.array_equal(first, _batches(seed=seed).at(3))


@settings(max_examples=200)
@given(st.integers(1, 40), st.integers(0, 3000), st.integers(1, 9), st.integers(1, 6))
def test_validation_windows_do_not_overlap_where_there_is_room(seq_len, beyond, batch_size, most):
    tokens = np.arange(seq_len + 1 + beyond, dtype=np.uint16)
    batches = validation_batches(tokens, batch_size=batch_size, seq_len=seq_len, max_batches=most)
    assert 1 <= len(batches) <= most
    assert all(batch.shape == (batch_size, seq_len + 1) for batch in batches)
    rows = np.concatenate(batches)
    count = min(most * batch_size, len(tokens) // (seq_len + 1))
    assert (rows[count:] == -1).all() and len(rows) - count < batch_size
    starts = rows[:count, 0]
    assert np.array_equal(rows[:count], starts[:, None] + np.arange(seq_len + 1))
    assert (np.diff(starts) > seq_len).all() and starts[0] == 0
    if count > 1:
        assert starts[-1] == len(tokens) - seq_len - 1


def test_too_few_tokens_for_a_window():
    with pytest.raises(DataError, match="16 tokens hold no window: seq_len 16 needs 17"):
        _batches(16)
    with pytest.raises(DataError, match="no window"):
        validation_batches(np.arange(16), batch_size=1, seq_len=16, max_batches=1)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux")
def test_a_token_file_larger_than_memory(tmp_path):
    (tmp_path / "large.bin").touch()
    os.truncate(tmp_path / "large.bin", 256 << 20)
    # The limit holds for what the process allocates; a read-only map of a file is not counted.
    code = (
        "import re, resource, sys; from experiments.data import check_corpus, load_corpus\n"
        "used = int(re.search(r'VmData:\\s+(\\d+)', open('/proc/self/status').read())[1]) << 10\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20),) * 2)\n"
        "check_corpus(load_corpus(sys.argv[1]), seq_len=8, vocab_size=2); print('fits')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "large.bin")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "fits\n", done.stderr


def test_names_in_the_hash_are_relative_to_the_matched_files(tmp_path, monkeypatch):
    _folder(tmp_path / "src/deep", b="b")
    _folder(tmp_path / "src", a="a")
    monkeypatch.chdir(tmp_path)
    relative, absolute = (load_corpus(w) for w in ("src/**/*.txt", f"{tmp_path}/src/**/*.txt"))
    assert (_text(relative.train), _text(relative.validation)) == (b"a\n", b"b\n")
    assert relative.sha256 == absolute.sha256
