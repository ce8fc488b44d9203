"""A `tokenizer.json`: text to token ids and back, by Hugging Face's tokenizers.

A text is encoded in pieces, and its tokens are those of the whole text. A piece ends at a place
where the tokens before it do not depend on the text after it: after a line, before a word, or
inside a long word between two tokens. A long word that has no such place is cut anyway, with a
warning.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data.documents import Document
from experiments.data.sources import UTF8_BOM, DataError
from jaxckpt.compatibility import install

TOKENIZER_JSON = "tokenizer.json"
_PIECE_BYTES = 1 << 15
_LONGEST = 4  # how many times longer a piece may be that has no end of a line or word
# Text farther from a cut than this is assumed not to change the tokens at the cut.
_CONTEXT_BYTES = 128
_TRIES = 8
_SPACES = b" \t\r\n\v\f"


class Piece(NamedTuple):
    """A part of a text, with some text before it.

    Attributes:
      text: The part and the text before it; bytes without a tokenizer.
      skipped: The number of tokens of the text before the part.
      num_bytes: The bytes of the part.
    """

    text: Any
    skipped: int = 0
    num_bytes: int = 0


class Tokenizer:
    """A `tokenizer.json`, without truncation, padding, and dropout of merges.

    Attributes:
      path: The file.
      sha256: The hash of the file.
      largest_token: The largest token id.
    """

    def __init__(self, path: Path):
        """Reads the file.

        Raises:
          DataError: The file cannot be read, or the package tokenizers is not installed.
        """
        try:
            import tokenizers
        except ImportError:
            raise DataError(
                f"{path} needs the package tokenizers: {install('experiments')}"
            ) from None
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises errors of several classes
            raise DataError(f"{path} is not a readable tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.version = tokenizers.__version__
        vocabulary = self._tokenizer.get_vocab()
        self.largest_token = max(vocabulary.values(), default=-1)
        self._longest_token = max(map(len, vocabulary), default=0)

    def pieces(self, document: Document, ending: bytes = b"") -> Iterator[Piece]:
        """Yields a text's pieces, a few 10,000 bytes each; line ends stay as they are.

        Args:
          document: A document of text. A byte order mark at its beginning is no part of it.
          ending: Bytes that end every text that is not empty.

        Raises:
          DataError: The text is not UTF-8; the error names the place and the byte.
        """
        waiting, looked, offset, before = bytearray(), 0, 0, Piece("")
        was_told = False
        while chunk := document.content.read(_PIECE_BYTES):
            waiting += chunk
            if offset == 0 and waiting.startswith(UTF8_BOM):
                offset = len(UTF8_BOM)
                del waiting[:offset]
            cut = self._cut(waiting, looked)
            looked = max(0, len(waiting) - _CONTEXT_BYTES)
            if cut is not None:
                following = self._before(waiting, cut)
            elif len(waiting) < _LONGEST * _PIECE_BYTES:
                continue
            else:
                cut, following, is_exact = self._inside(before, waiting)
                if not is_exact and not was_told:
                    was_told = True
                    print(
                        f"warning: {document.place} has no place to cut near byte {offset + cut}: "
                        "its tokens there may be others than those of the whole text",
                        file=sys.stderr,
                    )
            text = _decode(waiting[:cut], document.place, offset)
            yield Piece(before.text + text, before.skipped, cut)
            before = following
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

    def _inside(self, before: Piece, text: bytearray) -> tuple[int, Piece, bool]:
        """Cuts a text without lines and words, which begins at the start of a token.

        Returns the cut, the piece before the rest, and whether the tokens are those of the whole.
        """
        around = before.text + text.decode(errors="ignore")
        found = self._tokenizer.encode(around, add_special_tokens=False)
        most = len(around) - _CONTEXT_BYTES
        near = most - self._longest_token  # what follows may change the token before it
        ends = sorted({end for _, end in found.offsets if len(around) // 2 < end <= near})
        for end in ends[: -_TRIES - 1 : -1]:
            alone = self._ids(around[:end])
            rest = found.ids[len(alone) :]
            if not rest or found.ids[: len(alone)] != alone:
                continue
            for context in (around[:end][-_CONTEXT_BYTES:], ""):
                known = self._ids(context)
                if self._ids(context + around[end:]) == known + rest:
                    inside = _num_bytes(around[len(before.text) : end])
                    return inside, Piece(context, len(known)), True
        return _num_bytes(around[len(before.text) : most]), Piece(""), False

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


def _num_bytes(text: str) -> int:
    return len(text.encode())


def _decode(text: bytes | bytearray, place: str, offset: int) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place} is not UTF-8: byte 0x{text[error.start]:02x} at position "
            f"{offset + error.start} ({error.reason})"
        ) from None
