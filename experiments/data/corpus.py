"""A corpus: token ids for training and validation, with the hash of what they were made from.

Text is split by file: of the sorted files every tenth (the last one, where there are fewer than
ten) is for validation, and each file is ended by one newline byte so that files stay apart. A
single file is split by position and nothing is added to it, and so is a token file.

Text is bytes, or tokens where there is a tokenizer. A packed corpus knows where its documents begin
(`documents.py`): of these every tenth is for validation, and a token file is cut between two.
"""

import dataclasses
import functools
import hashlib
import platform
from pathlib import Path

import numpy as np

from experiments.data.documents import JSON_LINES, join, read_documents, starts_in
from experiments.data.sources import DataError, find_files, read_texts, standard_library
from experiments.data.tokenizer import Tokenizer
from experiments.data.tokens import SUFFIXES, chunks, map_tokens, scan

# Of ten files or documents the tenth is for validation; of a single one the last tenth.
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
      train_starts: Of a packed corpus, where its documents begin in `train`.
      validation_starts: The same in `validation`.
    """

    train: np.ndarray
    validation: np.ndarray
    sha256: str
    name: str
    num_files: int = 1
    skipped_files: int = 0
    largest_token: int | None = None
    tokenizer: Tokenizer | None = None
    train_starts: np.ndarray | None = None
    validation_starts: np.ndarray | None = None

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
        documents = ""
        if self.train_starts is not None and self.validation_starts is not None:
            documents = (
                f", {len(self.train_starts):,} training and {len(self.validation_starts):,} "
                "validation documents"
            )
        return (
            f"{self.name}: {files}{skipped}{kind}{documents}, {len(self.train):,} training and "
            f"{len(self.validation):,} validation tokens, sha256 {self.sha256[:12]}"
        )


def load_corpus(
    path: str | None,
    *,
    token_dtype: str = "uint16",
    tokenizer: Tokenizer | None = None,
    pack: bool = False,
    end_token: int | None = None,
) -> Corpus:
    """Returns the corpus that `--data` names: of text, bytes unless there is a tokenizer.

    Args:
      path: A text file, a folder, a glob, or a `.npy` or `.bin` token file; None is the source
        text of Python's standard library.
      token_dtype: The numbers of a `.bin` file, `"uint16"` or `"uint32"`.
      tokenizer: What makes tokens of text. A token file's are its own, but it decodes them.
      pack: Whether documents are kept apart; `.jsonl` files are read as documents then.
      end_token: The token that ends a document of a packed corpus, if there is one.

    Returns:
      The corpus; tokens of a token file stay in a memory map.

    Raises:
      DataError: Nothing readable there.
    """
    make = functools.partial(_from_documents, end_token=end_token) if pack else _from_texts
    if path is None:
        version = ".".join(platform.python_version_tuple()[:2])
        name = f"Python {version} standard library"
        return make(name, standard_library(), 0, tokenizer)
    files, base, hidden = find_files(path)
    if len(files) == 1 and files[0].suffix in SUFFIXES and not Path(path).is_dir():
        tokens = map_tokens(files[0], token_dtype)
        corpus = _from_tokens(path, tokens, tokenizer)
        return _pack_tokens(corpus, tokens, end_token) if pack else corpus
    if files and not pack and all(file.suffix == JSON_LINES for file in files):
        raise DataError(f"--data {path!r} is JSON Lines; --pack reads its documents")
    texts, skipped = read_texts(files, base)
    if not texts:
        what = "is empty or not text" if Path(path).is_file() else "holds no text file"
        raise DataError(f"--data {path!r} {what} ({hidden + skipped} skipped)")
    return make(path, texts, hidden + skipped, tokenizer)


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
    """Returns the corpus of all files as one text."""
    if len(texts) == 1:
        train, validation = _cut(_encode([texts[0][1]], tokenizer))
    else:
        parts = _every_tenth([text + b"\n" for _, text in texts])
        train, validation = (_encode(part, tokenizer) for part in parts)
    return Corpus(
        train=train,
        validation=validation,
        sha256=_hash(texts, tokenizer),
        name=name,
        num_files=len(texts),
        skipped_files=skipped,
        tokenizer=tokenizer,
    )


def _from_documents(
    name: str,
    texts: list[tuple[str, bytes]],
    skipped: int,
    tokenizer: Tokenizer | None,
    end_token: int | None,
) -> Corpus:
    """Returns the packed corpus of all documents."""
    documents = read_documents(texts, tokenizer, end_token)
    if not documents:
        raise DataError(f"{name} holds no document")
    one = len(documents) == 1
    parts = [[part] for part in _cut(documents[0])] if one else _every_tenth(documents)
    (train, train_starts), (validation, validation_starts) = map(join, parts)
    return Corpus(
        train=train,
        validation=validation,
        sha256=_packed_hash(_hash(texts, tokenizer), end_token),
        name=name,
        num_files=len(texts),
        skipped_files=skipped,
        tokenizer=tokenizer,
        train_starts=train_starts,
        validation_starts=validation_starts,
    )


def _pack_tokens(corpus: Corpus, tokens: np.ndarray, end_token: int | None) -> Corpus:
    """Returns a token file's corpus as a packed one; the cut moves to where a document begins."""
    starts = starts_in(tokens, end_token)
    later = starts[starts >= len(corpus.train)]
    cut = int(later[0]) if later.size else len(corpus.train)
    return dataclasses.replace(
        corpus,
        train=tokens[:cut],
        validation=tokens[cut:],
        sha256=_packed_hash(corpus.sha256, end_token),
        train_starts=starts[starts < cut],
        validation_starts=np.union1d([0], later - cut),
    )


def _hash(texts: list[tuple[str, bytes]], tokenizer: Tokenizer | None) -> str:
    """Returns the hash of texts with their names and lengths, and of the tokenizer."""
    digest = hashlib.sha256() if tokenizer is None else hashlib.sha256(tokenizer.sha256.encode())
    for path, text in texts:
        # A file's name need not be UTF-8; Python carries its odd bytes as surrogates.
        digest.update(f"{path}\0{len(text)}\0".encode(errors="surrogateescape"))
        digest.update(text)
    return digest.hexdigest()


def _packed_hash(sha256: str, end_token: int | None) -> str:
    """Returns the hash of what was packed and of how documents end."""
    return hashlib.sha256(f"{sha256} packed {end_token}".encode()).hexdigest()


def _every_tenth(items: list) -> tuple[list, list]:
    """Returns the items without every tenth, and every tenth; of fewer than ten, the last."""
    fold = min(_FOLDS, len(items))
    rest = [item for index, item in enumerate(items) if index % fold != fold - 1]
    return rest, items[fold - 1 :: fold]


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
