"""A `tokenizer.json`: text to token ids and back, by Hugging Face's tokenizers.

A text is encoded in pieces. Its tokens are those of the whole text: a piece ends where the tokens
of the text around it, with what follows and without, are the same up to there.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data.documents import Document
from experiments.data.sources import UTF8_BOM, DataError

TOKENIZER_JSON = "tokenizer.json"
_PIECE_BYTES = 1 << 15
# What decides whether a text may be cut is taken to be this near.
_CONTEXT_BYTES = 128
_TRIES = 8
_SPACES = b" \t\r\n\v\f"


class Piece(NamedTuple):
    """A part of a text, with some text before it.

    Attributes:
      text: Both; bytes where there is no tokenizer.
      skipped: Tokens of the text before it.
      num_bytes: Of the part.
    """

    text: Any
    skipped: int = 0
    num_bytes: int = 0


class Tokenizer:
    """What a `tokenizer.json` says.

    What its last use left in the file is off: truncation, padding, and dropout of merges.

    Attributes:
      path: The file.
      sha256: Its hash.
      largest_token: The largest token id it has.
    """

    def __init__(self, path: Path):
        """Reads the file.

        Raises:
          DataError: It cannot be read, or the package that reads it is not installed.
        """
        try:
            import tokenizers
        except ImportError:
            raise DataError(
                f"{path} needs the package tokenizers: pip install 'jaxckpt[experiments]'"
            ) from None
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package's own, ValueError among them
            raise DataError(f"{path} is not a readable tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.version = tokenizers.__version__
        self.largest_token = max(self._tokenizer.get_vocab().values(), default=-1)

    def pieces(self, document: Document, ending: bytes = b"") -> Iterator[Piece]:
        """Yields a text's pieces, a few 10,000 bytes each; line ends stay as they are.

        A text without a line or word to end a piece with is one piece.

        Args:
          document: Of text. A byte order mark at its beginning is no part of it.
          ending: What is put at the end of a text that is not empty.

        Raises:
          DataError: It is not UTF-8, by place and byte.
        """
        waiting, looked, offset, before = bytearray(), 0, 0, Piece("")
        while chunk := document.content.read(_PIECE_BYTES):
            waiting += chunk
            if offset == 0 and waiting.startswith(UTF8_BOM):
                offset = len(UTF8_BOM)
                del waiting[:offset]
            cut = self._cut(waiting, looked)
            looked = max(0, len(waiting) - _CONTEXT_BYTES)
            if cut is None:
                continue
            text = _decode(waiting[:cut], document.place, offset)
            yield Piece(before.text + text, before.skipped, cut)
            before = self._before(waiting, cut)
            del waiting[:cut]
            looked, offset = looked - cut, offset + cut
        if waiting:
            text = _decode(waiting + ending, document.place, offset)
            yield Piece(before.text + text, before.skipped, len(waiting))

    def encode(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Returns the token ids of each piece, uint32, without special tokens around them."""
        texts = [piece.text for piece in pieces]
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [
            np.array(one.ids[piece.skipped :], np.uint32)
            for one, piece in zip(found, pieces, strict=True)
        ]

    def decode(self, tokens: np.ndarray) -> str:
        """Returns the text of token ids, special tokens too."""
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    def _cut(self, text: bytearray, first: int) -> int | None:
        """Returns the last place behind `first` to cut at: after a line, or else before a word."""
        for mark, is_after in ((b"\n", 1), (b" ", 0)):
            place = len(text) - _CONTEXT_BYTES
            for _ in range(_TRIES):
                place = text.rfind(mark, first + 1, max(place, 0))
                if place < 0:
                    break
                around = (text[place - 1], text[place + 1])
                cut = place + is_after
                if not any(byte in _SPACES for byte in around) and self._is_apart(text, cut):
                    return cut
        return None

    def _is_apart(self, text: bytearray, cut: int) -> bool:
        before = self._before(text, cut).text
        after = text[cut : cut + _CONTEXT_BYTES].decode(errors="ignore")
        alone, both = self._ids(before), self._ids(before + after)
        return both[: len(alone)] == alone

    def _before(self, text: bytearray, cut: int) -> Piece:
        """Returns the end of a text before a cut, and how many tokens it is."""
        before = text[max(0, cut - _CONTEXT_BYTES) : cut].decode(errors="ignore")
        return Piece(before, len(self._ids(before)))

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def _decode(text: bytes | bytearray, place: str, offset: int) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place} is not UTF-8: byte 0x{text[error.start]:02x} at position "
            f"{offset + error.start} ({error.reason})"
        ) from None
