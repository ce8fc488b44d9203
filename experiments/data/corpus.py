"""A corpus: token ids for training and validation, with the hash of what they were made from."""

import dataclasses
import hashlib
import platform
from pathlib import Path

import numpy as np

from experiments.data.sources import DataError, standard_library, text_files
from experiments.data.tokens import SUFFIXES, chunks, map_tokens

# Of ten files the tenth is for validation; of a single file the last tenth.
_FOLDS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids of one text.

    Attributes:
      train: One-dimensional integers: bytes, or a memory map of a token file.
      validation: The same, from other files or a later part.
      sha256: Hash of the text: names, boundaries, order and contents.
      name: What it was made from.
      num_files: Files read.
      skipped_files: Files left out because they are empty or not text.
    """

    train: np.ndarray
    validation: np.ndarray
    sha256: str
    name: str
    num_files: int = 1
    skipped_files: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of both parts."""
        return len(self.train) + len(self.validation)

    @property
    def summary(self) -> str:
        """One line for people."""
        files = "1 file" if self.num_files == 1 else f"{self.num_files:,} files"
        skipped = f", {self.skipped_files} skipped" if self.skipped_files else ""
        return (
            f"{self.name}: {files}{skipped}, {len(self.train):,} training and "
            f"{len(self.validation):,} validation tokens, sha256 {self.sha256[:12]}"
        )


def load_corpus(path: str | None, *, token_dtype: str = "uint16") -> Corpus:
    """Returns the corpus that `--data` names, byte-level unless it is a token file.

    Args:
      path: A text file, a folder, a glob, or a `.npy` or `.bin` token file; None is the source
        text of Python's standard library.
      token_dtype: The numbers of a `.bin` file.

    Raises:
      DataError: Nothing readable there.
    """
    if path is None:
        version = ".".join(platform.python_version_tuple()[:2])
        return _from_texts(f"Python {version} standard library", standard_library(), 0)
    if Path(path).suffix in SUFFIXES and not Path(path).is_dir():
        return _from_tokens(path, token_dtype)
    texts, skipped = text_files(path)
    return _from_texts(path, texts, skipped)


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
    parts = (corpus.train, corpus.validation)
    largest = max(int(chunk.max()) for part in parts for chunk in chunks(part))
    if largest >= vocab_size:
        raise DataError(
            f"{corpus.name} has token {largest}, the model's vocabulary ends at {vocab_size - 1}; "
            f"--vocab-size {largest + 1} or more is needed"
        )


def _from_texts(name: str, texts: list[tuple[str, bytes]], skipped: int) -> Corpus:
    """Returns the bytes of all files, each ended by a newline so that files stay apart."""
    digest = hashlib.sha256()
    for path, text in texts:
        digest.update(f"{path}\0{len(text)}\0".encode())
        digest.update(text)
    if len(texts) == 1:
        text = texts[0][1]
        cut = len(text) - len(text) // _FOLDS
        train, validation = [text[:cut]], [text[cut:]]
    else:
        fold = min(_FOLDS, len(texts))
        validation = [text for index, (_, text) in enumerate(texts) if index % fold == fold - 1]
        train = [text for index, (_, text) in enumerate(texts) if index % fold != fold - 1]
    return Corpus(
        train=_join(train),
        validation=_join(validation),
        sha256=digest.hexdigest(),
        name=name,
        num_files=len(texts),
        skipped_files=skipped,
    )


def _from_tokens(path: str, token_dtype: str) -> Corpus:
    tokens = map_tokens(Path(path), token_dtype)
    digest = hashlib.sha256(tokens.dtype.str.encode())
    for chunk in chunks(tokens):
        digest.update(chunk.tobytes())
    cut = len(tokens) - len(tokens) // _FOLDS
    return Corpus(train=tokens[:cut], validation=tokens[cut:], sha256=digest.hexdigest(), name=path)


def _join(texts: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"\n".join(texts) + b"\n", np.uint8)
