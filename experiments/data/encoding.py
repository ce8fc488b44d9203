"""Turns documents into token ids in pieces, of which a few 100 KiB are in memory at once.

Bytes go to memory. Tokens of a tokenizer go to a file in jaxckpt's cache folder, and a second start
with the same text, tokenizer and settings finds them there. Deleting that folder is always safe.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import files
from experiments.config import ConfigError
from experiments.data.documents import Document, read_documents
from experiments.data.sources import DataError, TextFile
from experiments.data.tokenizer import Piece, Tokenizer
from jaxckpt.compiled import cache

# Every tenth document is for validation.
FOLDS = 10
# Encodings of a text take about a hundred times its bytes. The package encodes a batch's pieces in
# parallel.
_BATCH_BYTES = 1 << 18
_BATCH_ITEMS = 1 << 10
_VERSION = 1  # of the kept files
_OWNER = "experiments.data"  # of a folder that tokens are written to
_INDEX = ("starts", "held_out", "largest")
# The errors of reading an incomplete file.
_TORN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
_NONE = np.zeros(0, np.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """Documents one after another; the documents for validation come last.

    Attributes:
      tokens: All tokens, one-dimensional, in the smallest dtype that holds every token id.
      starts: The first token of each document, int64; documents without tokens are left out.
      held_out: The first token for validation; the number of tokens if there are fewer than ten
        documents.
      largest: The largest token.
    """

    tokens: np.ndarray
    starts: np.ndarray
    held_out: int
    largest: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """How documents become tokens.

    Attributes:
      tokenizer: Turns text into tokens; None for bytes.
      ending: Bytes that are added to every text.
      end_token: A token that is added to every text's tokens; None to add no token. Documents of
        tokens are unchanged.
    """

    tokenizer: Tokenizer | None
    ending: bytes = b""
    end_token: int | None = None

    def of(self, files: Sequence[TextFile], sha256: str) -> Encoded:
        """Returns the tokens of every document of some files.

        `sha256` is a hash of the files' names and contents, and of the tokenizer.

        Raises:
          DataError: There is no document, a line is no document, text is not UTF-8, or the disk has
            no room for the tokens.
        """
        if self.tokenizer is None:
            kept = io.BytesIO()
            index = self._write(files, kept, io.BytesIO())
            return _encoded(index, np.frombuffer(kept.getbuffer(), index["dtype"]))
        settings = [_VERSION, sha256, self.tokenizer.version, self.ending.hex(), self.end_token]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        return _kept(key, lambda *parts: self._write(files, *parts))

    def _write(self, files: Sequence[TextFile], kept: BinaryIO, held: BinaryIO) -> dict[str, Any]:
        """Writes tokens to `kept`, by way of `held` for validation; returns the index."""
        codec = _Bytes() if self.tokenizer is None else self.tokenizer
        largest = max(codec.largest_token, self.end_token or 0)
        if any(file.is_json_lines for file in files):
            largest = 2**32 - 1  # a line may give tokens itself
        writer = _Writer(kept, held, np.min_scalar_type(largest))
        total = sum(file.stamp[0] for file in files)
        with _progress(total, shown=self.tokenizer is not None) as advance:
            for batch in _batches(self._items(codec, read_documents(files))):
                pieces = [item for item in batch if isinstance(item, Piece)]
                encoded = iter(codec.encode(pieces))
                for item in batch:
                    if isinstance(item, _End):
                        writer.end(item.tokens)
                    else:
                        writer.add(next(encoded) if isinstance(item, Piece) else item)
                advance(sum(piece.num_bytes for piece in pieces))
        index = writer.index()
        if not len(index["starts"]):
            raise DataError("there is no document")
        return index

    def _items(self, codec, documents: Iterable[Document]) -> Iterator[Any]:
        end = _NONE if self.end_token is None else np.array([self.end_token], np.uint32)
        for document in documents:
            if isinstance(document.content, np.ndarray):
                yield document.content
                yield _End(_NONE)
            else:
                yield from codec.pieces(document, self.ending)
                yield _End(end)


class _End(NamedTuple):
    """The end of a document, with the end token if there is one."""

    tokens: np.ndarray


class _Bytes:
    """The interface of a tokenizer, for bytes."""

    largest_token = 255

    def pieces(self, document: Document, ending: bytes) -> Iterator[Piece]:
        chunk = b""
        while read := document.content.read(_BATCH_BYTES):
            chunk = read
            yield Piece(chunk, num_bytes=len(chunk))
        if chunk and ending:
            yield Piece(ending)

    def encode(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        return [np.frombuffer(piece.text, np.uint8) for piece in pieces]


class _Writer:
    """Writes documents to one stream, and every tenth to another, which is appended at the end."""

    def __init__(self, kept: BinaryIO, held: BinaryIO, dtype: np.dtype):
        self._streams, self._lengths, self._starts = (kept, held), [0, 0], ([], [])
        self._dtype, self._largest = dtype, -1
        self._documents, self._is_empty = 0, True

    def add(self, tokens: np.ndarray):
        """Adds tokens to the document."""
        if not tokens.size:
            return
        part = self._documents % FOLDS == FOLDS - 1
        if self._is_empty:
            self._starts[part].append(self._lengths[part])
            self._is_empty = False
        self._streams[part].write(tokens.astype(self._dtype).data)
        self._lengths[part] += len(tokens)
        self._largest = max(self._largest, int(tokens.max()))

    def end(self, tokens: np.ndarray):
        """Ends the document, with these tokens if it has any."""
        if not self._is_empty:
            self.add(tokens)
            self._documents, self._is_empty = self._documents + 1, True

    def index(self) -> dict[str, Any]:
        """Moves all tokens to the first stream, and returns their index."""
        kept, held = self._streams
        held.seek(0)
        shutil.copyfileobj(held, kept)
        kept.flush()
        first, later = (np.array(starts, np.int64) for starts in self._starts)
        return {
            "dtype": str(self._dtype),
            "size": sum(self._lengths),
            "starts": np.concatenate([first, later + self._lengths[0]]),
            "held_out": self._lengths[0],
            "largest": self._largest,
        }


def _batches(items: Iterable[Any]) -> Iterator[list]:
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += item.num_bytes if isinstance(item, Piece) else 0
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_ITEMS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _progress(total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the number of bytes done; a terminal shows a progress bar."""
    console = Console(stderr=True)
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    disable = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        task = progress.add_task("", total=total)
        yield lambda done: progress.advance(task, done)


def _kept(key: str, write: Callable[[BinaryIO, BinaryIO], dict[str, Any]]) -> Encoded:
    """Returns kept tokens; without them, keeps and returns what `write` writes.

    A complete folder gets its name by renaming. A part that a killed process left is removed. If
    nothing can be kept, a temporary folder is used, and removed as soon as its file is open.
    """
    home = cache.folder()
    with contextlib.ExitStack() as stack:
        try:
            if home is None:
                raise OSError
            place = home / "tokens" / key
            with contextlib.suppress(*_TORN):
                return _open(place)
            for left in place.parent.glob("part-*"):
                files.remove_left(left, _OWNER)
            own = files.own_folder(place.parent / f"part-{uuid.uuid4().hex}", _OWNER, "index.npz")
            part = stack.enter_context(own)
        except (OSError, ConfigError):
            place, part = None, Path(tempfile.mkdtemp(prefix="jaxckpt-"))
        try:
            with (part / "tokens").open("wb") as tokens, tempfile.TemporaryFile(dir=part) as held:
                index = write(tokens, held)
            np.savez(part / "index.npz", **index)
            return _open(part if place is None else _moved(part, place))
        except OSError as error:
            raise DataError(
                f"cannot keep tokens in {part.parent}: {error.strerror or error}; JAXCKPT_CACHE "
                "names another folder"
            ) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _moved(part: Path, place: Path) -> Path:
    """Returns a folder under its name; another process may have taken it with the same tokens."""
    try:
        os.rename(part, place)
    except OSError:
        try:
            _open(place)
        except _TORN:
            shutil.rmtree(place, ignore_errors=True)  # torn
            os.rename(part, place)
    return place


def _open(folder: Path) -> Encoded:
    with np.load(folder / "index.npz") as file:
        index = {name: value if value.ndim else value.item() for name, value in file.items()}
    return _encoded(index, np.memmap(folder / "tokens", index["dtype"], "r", shape=index["size"]))


def _encoded(index: dict[str, Any], tokens: np.ndarray) -> Encoded:
    return Encoded(tokens=tokens, **{name: index[name] for name in _INDEX})
