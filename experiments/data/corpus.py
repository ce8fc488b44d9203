"""A corpus: token ids for training and validation, with the hash of what they were made from.

Text is split by file: of the sorted files every tenth (the last one, where there are fewer than
ten) is for validation, and each file is ended by one newline byte so that files stay apart. A
single file is split by position and nothing is added to it, and so is a token file.

Text is bytes, or tokens where there is a tokenizer.
"""

import dataclasses
import hashlib
import platform
from pathlib import Path

import numpy as np

from experiments.data.sources import DataError, find_files, read_texts, standard_library
from experiments.data.tokenizer import Tokenizer
from experiments.data.tokens import SUFFIXES, chunks, map_tokens, scan

# Of ten files the tenth is for validation; of a single file the last tenth.
_FOLDS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids of one text.

    Attributes:
      train: One-dimensional integers: bytes, or a memory map of a token file.
      validation: The same, from other files or a later part.
      sha256: Hash of the text: names, boundaries, order and contents; and of the tokenizer.
      name: What it was made from.
      num_files: Files read.
      skipped_files: Files left out because they are hidden, empty or not text.
      largest_token: The largest token id, where reading the text has found it already.
      tokenizer: What turns text into these tokens and back; None for bytes.
    """

    train: np.ndarray
    validation: np.ndarray
    sha256: str
    name: str
    num_files: int = 1
    skipped_files: int = 0
    largest_token: int | None = None
    tokenizer: Tokenizer | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of both parts."""
        return len(self.train) + len(self.validation)

    @property
    def summary(self) -> str:
        """One line for people."""
        files = "1 file" if self.num_files == 1 else f"{self.num_files:,} files"
        skipped = f", {self.skipped_files} skipped" if self.skipped_files else ""
        kind = "" if self.tokenizer is None else f", tokens of {self.tokenizer.path}"
        return (
            f"{self.name}: {files}{skipped}{kind}, {len(self.train):,} training and "
            f"{len(self.validation):,} validation tokens, sha256 {self.sha256[:12]}"
        )


def load_corpus(
    path: str | None, *, token_dtype: str = "uint16", tokenizer: Tokenizer | None = None
) -> Corpus:
    """Returns the corpus that `--data` names: of text, bytes unless there is a tokenizer.

    Args:
      path: A text file, a folder, a glob, or a `.npy` or `.bin` token file; None is the source
        text of Python's standard library.
      token_dtype: The numbers of a `.bin` file, `"uint16"` or `"uint32"`.
      tokenizer: What makes tokens of text. A token file's are its own, but it decodes them.

    Returns:
      The corpus; tokens of a token file stay in a memory map.

    Raises:
      DataError: Nothing readable there.
    """
    if path is None:
        version = ".".join(platform.python_version_tuple()[:2])
        name = f"Python {version} standard library"
        return _from_texts(name, standard_library(), 0, tokenizer)
    files, base, hidden = find_files(path)
    if len(files) == 1 and files[0].suffix in SUFFIXES and not Path(path).is_dir():
        return _from_tokens(path, map_tokens(files[0], token_dtype), tokenizer)
    texts, skipped = read_texts(files, base)
    if not texts:
        what = "is empty or not text" if Path(path).is_file() else "holds no text file"
        raise DataError(f"--data {path!r} {what} ({hidden + skipped} skipped)")
    return _from_texts(path, texts, hidden + skipped, tokenizer)


def check_corpus(corpus: Corpus, *, seq_len: int, vocab_size: int):
    """Raises unless both parts hold a window and every token is in the vocabulary.

    Raises:
      DataError: Too short, or a token that the model has no embedding for.
    """
    for part in ("train", "validation"):
        found = len(getattr(corpus, part))
        if found < seq_len + 1:
            raise DataError(
                f"{corpus.name}: the {part} part has {found} tokens, a window of --seq-len "
                f"{seq_len} needs {seq_len + 1}; a tenth of the text is kept for validation"
            )
    largest = corpus.largest_token
    if largest is None:
        parts = (corpus.train, corpus.validation)
        largest = max(int(chunk.max()) for part in parts for chunk in chunks(part))
    if largest >= vocab_size:
        raise DataError(
            f"{corpus.name} has token {largest}, the model's vocabulary ends at {vocab_size - 1}; "
            f"--vocab-size {largest + 1} or more is needed"
        )


def _from_texts(
    name: str, texts: list[tuple[str, bytes]], skipped: int, tokenizer: Tokenizer | None
) -> Corpus:
    """Returns the corpus of all files; names and lengths are hashed with the contents."""
    digest = hashlib.sha256() if tokenizer is None else hashlib.sha256(tokenizer.sha256.encode())
    for path, text in texts:
        # A file's name need not be UTF-8; Python carries its odd bytes as surrogates.
        digest.update(f"{path}\0{len(text)}\0".encode(errors="surrogateescape"))
        digest.update(text)
    if len(texts) == 1:
        train, validation = _cut(_encode([texts[0][1]], tokenizer))
    else:
        fold = min(_FOLDS, len(texts))
        is_held_out = [index % fold == fold - 1 for index in range(len(texts))]
        parts = [
            [
                text + b"\n"
                for (_, text), held in zip(texts, is_held_out, strict=True)
                if held == part
            ]
            for part in (False, True)
        ]
        train, validation = (_encode(part, tokenizer) for part in parts)
    return Corpus(
        train=train,
        validation=validation,
        sha256=digest.hexdigest(),
        name=name,
        num_files=len(texts),
        skipped_files=skipped,
        tokenizer=tokenizer,
    )


def _from_tokens(name: str, tokens: np.ndarray, tokenizer: Tokenizer | None) -> Corpus:
    sha256, largest = scan(tokens)
    train, validation = _cut(tokens)
    return Corpus(
        train=train,
        validation=validation,
        sha256=sha256,
        name=name,
        largest_token=largest,
        tokenizer=tokenizer,
    )


def _cut(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first nine tenths and the last tenth; parts of a memory map stay mapped."""
    cut = len(tokens) - len(tokens) // _FOLDS
    return tokens[:cut], tokens[cut:]


def _encode(texts: list[bytes], tokenizer: Tokenizer | None) -> np.ndarray:
    """Returns texts one after another, as bytes or as tokens."""
    if tokenizer is None:
        return np.frombuffer(b"".join(texts), np.uint8)
    return np.concatenate([np.zeros(0, np.uint32), *tokenizer.encode(texts)])
