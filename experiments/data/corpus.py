"""A corpus: token ids for training and validation, with the hash of what they were made from.

Text is split by file. Every tenth of the sorted files is for validation; of fewer than ten files it
is the last one. A newline byte is added to each file, so that files stay apart. A single file, or a
token file, is split by position, and nothing is added to it. If a split by files would hold out
more than half of the text, the split is by position too, and the summary says so.

Text is bytes, or the tokens of a tokenizer. A packed corpus knows where its documents begin
(`documents.py`). Every tenth document is for validation; a token file is cut between two documents.
"""

import dataclasses
import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.data.documents import starts_in
from experiments.data.encoding import FOLDS, Encoding
from experiments.data.sources import (
    DataError,
    TextFile,
    find_files,
    standard_library,
    text_files,
    token_format,
)
from experiments.data.tokenizer import Tokenizer
from experiments.data.tokens import map_tokens, scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids of one text.

    Attributes:
      train: One-dimensional integers: bytes, or a memory map of a token file.
      validation: Tokens of other files or of a later part.
      sha256: Hash of the text (names, boundaries, order, contents) and of the tokenizer.
      name: What it was made from.
      num_files: Files read.
      skipped_files: Files left out: hidden, empty or binary ones, and links to files found already.
      largest_token: The largest token id.
      tokenizer: Turns text into tokens and back; None for bytes.
      train_starts: The first token of each document in `train`; None without packing.
      validation_starts: The first token of each document in `validation`; None without packing.
      is_cut_by_size: Whether the last tenth of the tokens is for validation, because every tenth
        file or document would be more than half of them.
    """

    train: np.ndarray
    validation: np.ndarray
    sha256: str
    name: str
    num_files: int = 1
    skipped_files: int = 0
    largest_token: int = 255
    tokenizer: Tokenizer | None = None
    train_starts: np.ndarray | None = None
    validation_starts: np.ndarray | None = None
    is_cut_by_size: bool = False

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
        if self.is_cut_by_size:
            documents += ", cut by size (whole files would hold out more than they leave)"
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
    vocab_size: int | None = None,
) -> Corpus:
    """Returns the corpus that `--data` names: of text, bytes unless there is a tokenizer.

    Args:
      path: A text file, a folder, a glob, or a `.npy` or `.bin` token file; None is the source
        text of Python's standard library.
      token_dtype: The numbers of a `.bin` file, `"uint16"` or `"uint32"`.
      tokenizer: Turns text into tokens. Tokens of a token file are only decoded by it.
      pack: Whether documents are kept apart. If so, JSON Lines are read as documents.
      end_token: The token that ends a document of a packed corpus; None if documents have none.
      vocab_size: The size of the model's vocabulary, for which a `.bin` file's numbers must be
        wide enough; None if unknown.

    Raises:
      DataError: There is no readable file, or its content is of another form.
    """
    end_token = end_token if pack else None
    if path is None:
        version = ".".join(platform.python_version_tuple()[:2])
        name, files, skipped = f"Python {version} standard library", standard_library(), 0
    else:
        paths, base, hidden = find_files(path)
        kind = token_format(paths[0]) if len(paths) == 1 and not Path(path).is_dir() else None
        if kind is not None:
            tokens = map_tokens(paths[0], token_dtype if kind == "bin" else None, vocab_size)
            return _from_tokens(path, tokens, tokenizer, pack, end_token)
        name, (files, skipped) = path, text_files(paths, base)
        skipped += hidden
    lines = [file.name for file in files if file.is_json_lines]
    if lines and not pack:
        more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
        raise DataError(
            f"--data {path!r}: {lines[0]}{more} is JSON Lines; --pack reads its documents"
        )
    if not files:
        what = "is empty or not text" if Path(name).is_file() else "holds no text file"
        raise DataError(f"--data {name!r} {what} ({skipped} skipped)")
    corpus = _from_texts(name, files, tokenizer, pack, end_token)
    return dataclasses.replace(corpus, num_files=len(files), skipped_files=skipped)


def check_corpus(corpus: Corpus, *, seq_len: int, vocab_size: int):
    """Raises `DataError` unless both parts hold a window with a target, of the model's tokens."""
    for part in ("train", "validation"):
        found, starts = len(getattr(corpus, part)), getattr(corpus, f"{part}_starts")
        if found < seq_len + 1:
            raise DataError(
                f"{corpus.name}: the {part} part has {found} tokens, a window of --seq-len "
                f"{seq_len} needs {seq_len + 1}; a tenth of the text is kept for validation"
            )
        targets = (found - 1) // seq_len * seq_len  # of whole rows
        if starts is not None and np.count_nonzero((starts > 0) & (starts <= targets)) == targets:
            raise DataError(
                f"{corpus.name}: no document of the {part} part has a second token, so there is "
                "nothing to predict"
            )
    if corpus.largest_token >= vocab_size:
        raise DataError(
            f"{corpus.name} has token {corpus.largest_token}, the model's vocabulary ends at "
            f"{vocab_size - 1}; --vocab-size {corpus.largest_token + 1} or more is needed"
        )


def _from_texts(
    name: str,
    files: Sequence[TextFile],
    tokenizer: Tokenizer | None,
    pack: bool,
    end_token: int | None,
) -> Corpus:
    """Returns the corpus of some files' documents; without packing each file is one."""
    sha256 = _hash(files, tokenizer)
    is_ended = end_token is None and (pack or len(files) > 1)
    how = Encoding(tokenizer=tokenizer, ending=b"\n" if is_ended else b"", end_token=end_token)
    try:
        found = how.of(files, sha256)
    except DataError as error:
        raise DataError(f"--data {name!r}: {error}") from None
    sha256 = _packed_hash(sha256, end_token) if pack else sha256
    corpus = _whole(name, found.tokens, sha256, found.largest, tokenizer)
    size, held_out = len(found.tokens), found.held_out
    if held_out == size and len(found.starts) > 1:
        held_out = int(found.starts[-1])  # fewer than ten: the last one
    if size - held_out <= held_out < size:
        return _cut(corpus, held_out, found.starts if pack else None)
    corpus = _cut_by_position(corpus, found.starts if pack else None)
    if held_out == size:
        return corpus
    sha256 = hashlib.sha256(f"{corpus.sha256} by size".encode()).hexdigest()
    return dataclasses.replace(corpus, sha256=sha256, is_cut_by_size=True)


def _from_tokens(
    name: str,
    tokens: np.ndarray,
    tokenizer: Tokenizer | None,
    pack: bool,
    end_token: int | None,
) -> Corpus:
    sha256, largest = scan(tokens)
    starts = starts_in(tokens, end_token) if pack else None
    is_whole = starts is not None and len(starts) == 1
    if is_whole and end_token is not None and tokens[-1] != end_token:
        raise DataError(
            f"the end token {end_token} is nowhere in {name!r}, so no document ends; --end-token "
            "names the one that does"
        )
    sha256 = _packed_hash(sha256, end_token) if pack else sha256
    return _cut_by_position(_whole(name, tokens, sha256, largest, tokenizer), starts)


def _whole(name: str, tokens: np.ndarray, sha256: str, largest: int, tokenizer) -> Corpus:
    return Corpus(
        train=tokens,
        validation=tokens[:0],
        sha256=sha256,
        name=name,
        largest_token=largest,
        tokenizer=tokenizer,
    )


def _cut_by_position(corpus: Corpus, starts: np.ndarray | None) -> Corpus:
    """Returns a corpus whose last tenth, from the start of a document, is for validation."""
    cut = len(corpus.train) - len(corpus.train) // FOLDS
    later = [] if starts is None else starts[starts >= cut]
    return _cut(corpus, int(later[0]) if len(later) else cut, starts)


def _cut(corpus: Corpus, cut: int, starts: np.ndarray | None) -> Corpus:
    """Returns a corpus with its `train` tokens cut in two; parts of a memory map stay mapped."""
    tokens = corpus.train
    corpus = dataclasses.replace(corpus, train=tokens[:cut], validation=tokens[cut:])
    if starts is None:
        return corpus
    return dataclasses.replace(
        corpus,
        train_starts=starts[starts < cut],
        validation_starts=np.union1d([0], starts[starts >= cut] - cut),
    )


def _hash(files: Sequence[TextFile], tokenizer: Tokenizer | None) -> str:
    """Returns the hash of texts with their names and lengths, and of the tokenizer."""
    digest = hashlib.sha256() if tokenizer is None else hashlib.sha256(tokenizer.sha256.encode())
    for file in files:
        # A file's name need not be UTF-8; Python carries its odd bytes as surrogates.
        digest.update(f"{file.name}\0{file.stamp[0]}\0".encode(errors="surrogateescape"))
        for chunk in file.chunks():
            digest.update(chunk)
    return digest.hexdigest()


def _packed_hash(sha256: str, end_token: int | None) -> str:
    """Returns the hash of a packed corpus: of its text and of its end token."""
    return hashlib.sha256(f"{sha256} packed {end_token}".encode()).hexdigest()
