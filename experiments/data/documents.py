"""Documents: texts that packing keeps apart, and where each begins.

A text file is one document; each line of a JSON Lines file is one, as text or as tokens:

    {"text": "Once upon a time"}
    {"tokens": [3, 1, 4, 1, 5]}

In a file of tokens the end token closes a document.
"""

import io
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from experiments.data.sources import UTF8_BOM, DataError, TextFile
from experiments.data.tokens import chunks

_SHOWN_LINES = 3


class Document(NamedTuple):
    """A document before it is tokens.

    Attributes:
      place: The file, and the line in it, for error texts.
      content: A text as a stream of bytes, to be read before the next document is taken; or an
        array of tokens.
    """

    place: str
    content: Any


def read_documents(files: Iterable[TextFile]) -> Iterator[Document]:
    """Yields every document of some files, empty ones too.

    Raises:
      DataError: A line is no document, or a file cannot be read.
    """
    for file in files:
        try:
            with file.path.open("rb") as stream:
                if file.is_json_lines:
                    yield from _lines(file.name, stream)
                else:
                    yield Document(file.name, stream)
            file.check_unchanged()
        except OSError as error:
            raise DataError(f"cannot read {str(file.path)!r}: {error.strerror}") from None


def starts_in(tokens: np.ndarray, end_token: int | None) -> np.ndarray:
    """Returns where each document of a token file begins: after every end token, and at 0."""
    ends, offset = [], 0
    for chunk in chunks(tokens) if end_token is not None else ():
        ends.append(np.flatnonzero(chunk == end_token) + offset)
        offset += len(chunk)
    starts = np.concatenate([[0], *(end + 1 for end in ends)]).astype(np.int64)
    return starts[starts < len(tokens)]


def _lines(name: str, stream: BinaryIO) -> Iterator[Document]:
    """Yields the documents of a JSON Lines file; empty lines are skipped."""
    wrong, more = [], 0
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(UTF8_BOM) if number == 1 else line
        if not line.strip():
            continue
        try:
            content = _content(json.loads(line.decode()))
        except (ValueError, RecursionError) as error:
            wrong.append(f"line {number}: {error}")
            more += len(wrong) > _SHOWN_LINES
            del wrong[_SHOWN_LINES:]
            continue
        if not wrong:
            yield Document(f"{name}, line {number}", content)
    if wrong:
        raise DataError(f"{name}, {'; '.join(wrong)}{f'; {more} more' if more else ''}")


def _content(value: object) -> BinaryIO | np.ndarray:
    if not isinstance(value, dict) or ("text" in value) == ("tokens" in value):
        raise ValueError('a document is {"text": "..."} or {"tokens": [...]}')
    if "text" in value:
        if not isinstance(value["text"], str):
            raise ValueError(f"text is {type(value['text']).__name__}, not a string")
        return io.BytesIO(value["text"].encode())
    tokens = value["tokens"]
    is_token = lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**32
    if not isinstance(tokens, list) or not all(map(is_token, tokens)):
        raise ValueError("tokens are no list of whole numbers from 0 to 2^32 - 1")
    return np.array(tokens, np.uint32)
