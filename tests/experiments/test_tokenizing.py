"""Text to a tokenizer's tokens: in pieces as whole, strictly, in little memory, and only once."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFace

from experiments import files
from experiments.data import DataError, load_corpus
from experiments.data.documents import Document
from experiments.data.tokenizer import Tokenizer
from jaxckpt.compiled import cache
from tests.experiments import hf_folders

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
# What Qwen's tokenizer.json splits by; the tokens of whitespace depend on what follows.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [
    *(
        "the",
        "of",
        " return",
        "def ",
        "😀",
        "👩‍👩‍👧‍👦",
        "é",
        "e\u0301",
        "中文",
        "。",
        "12345",
        "...",
        "'s",
    ),
    *("\t", "  ", "\n", "\n\n", "\r\n", "!?", "x" * 50, "<|endoftext|>", "\u00a0", "\u3000", "ß"),
]


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    found = []
    for _ in range(rng.randint(1, 3000)):
        found += [rng.choice(WORDS), " " * (rng.random() < 0.5), "\n" * (rng.random() < 0.1)]
    return "".join(found)


def byte_level(**options) -> HuggingFace:
    made = HuggingFace(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = {"initial_alphabet": alphabet, "special_tokens": ["<|endoftext|>"]}
    return made, trainers.BpeTrainer(vocab_size=600, show_progress=False, **trainer)


def qwen() -> HuggingFace:
    made, trainer = byte_level(use_regex=False)
    split = pre_tokenizers.Split(Regex(QWEN), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, made.pre_tokenizer])
    made.normalizer = normalizers.NFC()
    return made, trainer


def stripping():
    made, trainer = byte_level(add_prefix_space=True)
    made.normalizer = normalizers.Strip()
    return made, trainer


def sentences():
    """A whole text is one word that begins with a mark, as in Llama 2."""
    made = HuggingFace(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(marks)
    options = {"special_tokens": ["<unk>"], "max_token_length": 8, "show_progress": False}
    return made, trainers.BpeTrainer(vocab_size=500, **options)


def words():
    made = HuggingFace(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.normalizer = normalizers.BertNormalizer()
    options = {"special_tokens": ["[UNK]"], "show_progress": False}
    return made, trainers.WordPieceTrainer(vocab_size=500, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [byte_level, qwen, stripping, sentences, words])
def test_pieces_have_the_tokens_of_the_whole(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.data.tokenizer._PIECE_BYTES", 600)
    made, trainer = kind()
    made.train_from_iterator(map(random_text, range(20)), trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    cuts = 0
    for seed in range(100, 140):
        text = random_text(seed)
        document = Document("x", io.BytesIO(text.encode()))
        pieces = list(tokenizer.pieces(document, b"\n"))
        whole = made.encode(text + "\n", add_special_tokens=False).ids
        assert np.concatenate(tokenizer.encode(pieces)).tolist() == whole
        cuts += len(pieces) - 1
    assert cuts > 400


def long_texts():
    rng = random.Random(0)
    letters = "".join(rng.choices("abcdeé文", k=9000))
    return ("x" * 9000, "abc" * 3000, "\n" * 9000, "😀" * 3000, letters, f"{letters}。" * 2)


@pytest.mark.slow
@pytest.mark.parametrize("has_long_tokens", [False, True])
@pytest.mark.parametrize("kind", [byte_level, qwen, stripping, sentences, words])
def test_text_without_lines_and_words_is_cut_too(
    kind, has_long_tokens, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("experiments.data.tokenizer._PIECE_BYTES", 600)
    made, trainer = kind()
    texts = [*map(random_text, range(20)), *(long_texts() if has_long_tokens else ())]
    made.train_from_iterator(texts, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    is_same = []
    for text in long_texts():
        pieces = list(tokenizer.pieces(Document("a.txt", io.BytesIO(text.encode())), b"\n"))
        assert max(len(piece.text.encode()) for piece in pieces) < 6 * 600
        assert sum(piece.num_bytes for piece in pieces) == len(text.encode())
        whole = made.encode(text + "\n", add_special_tokens=False).ids
        is_same.append(np.concatenate(tokenizer.encode(pieces)).tolist() == whole)
        warning = capsys.readouterr().err
        if not is_same[-1]:
            assert warning.startswith("warning: a.txt has no place to cut near byte ")
            assert warning.count("\n") == 1
    # To the last two, letters that they do not know are one unknown token, however many.
    assert has_long_tokens or all(is_same) == (kind not in (sentences, words))


def corpus_of(folder: Path, text: bytes, **options):
    (folder / "a.txt").write_bytes(text)
    if not (folder / "tokenizer.json").exists():
        hf_folders.write_tokenizer(folder)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    return load_corpus(str(folder / "a.txt"), tokenizer=tokenizer, **options)


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path / "kept"))


def text_of(corpus) -> str:
    return corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.validation]))


def test_what_a_tokenizers_last_use_left_is_off(tmp_path):
    hf_folders.write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    plain = corpus_of(tmp_path, b"import the return " * 500)
    used = HuggingFace.from_file(str(path))
    used.enable_truncation(16)
    used.enable_padding(length=1 << 12, pad_id=0)
    content = json.loads(used.to_str())
    content["model"]["dropout"] = 0.5
    assert content["truncation"] and content["padding"]
    path.write_text(json.dumps(content))
    again = corpus_of(tmp_path, b"import the return " * 500)
    assert again.sha256 != plain.sha256 and again.num_tokens == plain.num_tokens > 500
    assert np.array_equal(again.train, plain.train)


def test_text_is_utf8_or_refused_by_file_and_place(tmp_path):
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8: byte 0xe9 at position 5 \("):
        corpus_of(tmp_path, b"caf\n \xe9 au lait " * 9)
    lines = b"one line of text\n" * 9000
    with pytest.raises(DataError, match=rf"byte 0xff at position {len(lines) + 3 + 1} "):
        corpus_of(tmp_path, b"\xef\xbb\xbf" + lines + b"a\xff\n" + lines)
    # Bytes are bytes.
    (tmp_path / "a.txt").write_bytes(b"caf\xe9" * 9)
    assert load_corpus(str(tmp_path / "a.txt")).num_tokens == 36


def test_a_byte_order_mark_is_no_text_and_line_ends_stay(tmp_path):
    text = "a line\r\n" * 3000 + "the last \N{SNOWMAN}"
    assert text_of(corpus_of(tmp_path, b"\xef\xbb\xbf" + text.encode())) == text


def test_a_second_start_encodes_nothing(tmp_path, monkeypatch):
    texts = b"import the return of 12\n" * 4000
    first = corpus_of(tmp_path, texts, pack=True, end_token=7)
    assert first.train[-1] != 7 and first.validation[-1] == 7

    def refuse(*_):
        raise AssertionError("encoded again")

    with monkeypatch.context() as changed:
        changed.setattr(Tokenizer, "encode", refuse)
        again = corpus_of(tmp_path, texts, pack=True, end_token=7)
        for name in ("train", "validation", "train_starts", "validation_starts"):
            assert np.array_equal(getattr(again, name), getattr(first, name))
        assert again.summary == first.summary and again.largest_token == first.largest_token
        for other in ({"end_token": 8, "pack": True}, {"pack": True}):  # other tokens
            with pytest.raises(AssertionError):
                corpus_of(tmp_path, texts, **other)
        with pytest.raises(AssertionError):
            corpus_of(tmp_path, texts + b"!", pack=True, end_token=7)
    # What is not whole is made again, and so is what was deleted.
    for left in (b"torn", b"", None):
        for name in ("tokens", "index.npz"):
            (path,) = cache.folder().glob(f"tokens/*/{name}")
            path.unlink()  # a map of it lives on
            if left is not None:
                path.write_bytes(left)
            again = corpus_of(tmp_path, texts, pack=True, end_token=7)
            assert np.array_equal(again.train, first.train)
    assert len(list(cache.folder().glob("tokens/*"))) == 1, "nothing half-written is left"


def test_what_a_killed_start_left_is_removed(tmp_path):
    """And nothing else: not what a process still writes, and nothing of somebody else's."""
    texts = b"import the return of 12\n" * 400
    base = cache.folder() / "tokens"
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom experiments import files\n"
        "with files.own_folder(Path(sys.argv[1]), 'experiments.data', 'index.npz') as folder:\n"
        "    (folder / 'tokens').write_bytes(b'torn')\n"
        "    os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, base / "part-dead"], cwd=ROOT, check=True)
    (base / "part-theirs").mkdir()
    (base / "part-theirs/notes").touch()
    with files.own_folder(base / "part-live", "experiments.data", "index.npz") as live:
        (live / "tokens").write_bytes(b"half")
        assert (base / "part-dead/tokens").read_bytes() == b"torn"
        corpus_of(tmp_path, texts)
        left = {path.name for path in base.glob("part-*")}
        assert left == {"part-theirs", "part-live"}
    assert (live / "tokens").read_bytes() == b"half"
    assert len([*base.iterdir()]) == 3


def test_without_a_place_to_keep_tokens(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path / "file/below"))
    text = "import the return " * 500
    assert text_of(corpus_of(tmp_path, text.encode())) == text
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_large_text_takes_little_memory(with_tokenizer, tmp_path):
    """At most three bytes a byte of text, with the tokens, of which this text has one a byte."""
    rng, size = np.random.default_rng(0), 24 * MIB
    letters = rng.choice(np.frombuffer(b"qxzjkvw \n", np.uint8), size)
    letters[:: MIB // 2] = ord("\n")
    (tmp_path / "a.txt").write_bytes(letters.tobytes())
    hf_folders.write_tokenizer(tmp_path)
    code = (
        "import pathlib, resource, sys\n"
        "from experiments.data import load_corpus\n"
        "from experiments.data.tokenizer import Tokenizer\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "tokenizer = Tokenizer(path / 'tokenizer.json') if sys.argv[2] == 'True' else None\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before = peak()\n"
        "corpus = load_corpus(str(path / 'a.txt'), tokenizer=tokenizer)\n"
        "print(peak() - before, corpus.num_tokens)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(with_tokenizer)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    grown, tokens = map(int, done.stdout.split())
    assert tokens > size / 2 and grown <= 3 * size, done.stderr
