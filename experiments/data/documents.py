"""Documents: the texts that a row of packed data keeps apart, and where each begins.

A text file is one document; each line of a JSON Lines file (`.jsonl`) is one, as text or as tokens:

    {"text": "Once upon a time"}
    {"tokens": [3, 1, 4, 1, 5]}

In a file of tokens the end token closes a document.
"""

import json
from collections.abc import Iterable, Sequence

import numpy as np

from experiments.data.sources import DataError
from experiments.data.tokenizer import Tokenizer
from experiments.data.tokens import chunks

JSON_LINES = ".jsonl"
_SHOWN_LINES = 3


def read_documents(
    texts: Iterable[tuple[str, bytes]], tokenizer: Tokenizer | None, end_token: int | None
) -> list[np.ndarray]:
    """Returns the token ids of every document that is not empty.

    Args:
      texts: Names and contents of files.
      tokenizer: What makes tokens of text; None for bytes.
      end_token: Put at a text's end; without one a newline is, so that a document ends in some
        way. Tokens that are given as tokens stay as they are.

    Raises:
      DataError: Lines that are no documents, by file and number.
    """
    found: list[bytes | np.ndarray] = []
    for name, content in texts:
        found += _lines(name, content) if name.endswith(JSON_LINES) else [content]
    written = [text for text in found if isinstance(text, bytes)]
    encoded = iter(_encode(written, tokenizer, end_token))
    documents = [next(encoded) if isinstance(item, bytes) else item for item in found]
    return [document for document in documents if document.size]


def join(documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns documents one after another, and where each begins."""
    lengths = [len(document) for document in documents]
    return np.concatenate(documents), np.cumsum([0, *lengths[:-1]], dtype=np.int64)


def starts_in(tokens: np.ndarray, end_token: int | None) -> np.ndarray:
    """Returns where each document of a token file begins: after every end token, and at 0."""
    ends, offset = [], 0
    for chunk in chunks(tokens) if end_token is not None else ():
        ends.append(np.flatnonzero(chunk == end_token) + offset)
        offset += len(chunk)
    starts = np.concatenate([[0], *(end + 1 for end in ends)]).astype(np.int64)
    return starts[starts < len(tokens)]


def _encode(
    texts: list[bytes], tokenizer: Tokenizer | None, end_token: int | None
) -> list[np.ndarray]:
    if end_token is None:
        texts = [text + b"\n" if text else text for text in texts]
    if tokenizer is None:
        found = [np.frombuffer(text, np.uint8) for text in texts]
    else:
        found = tokenizer.encode(texts)
    if end_token is None:
        return found
    return [np.append(ids, np.uint32(end_token)) if ids.size else ids for ids in found]


def _lines(name: str, content: bytes) -> list[bytes | np.ndarray]:
    """Returns the documents of a JSON Lines file; empty lines are none."""
    found, wrong = [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_document(json.loads(line)))
        except (ValueError, RecursionError) as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f"; {len(wrong) - _SHOWN_LINES} more" if len(wrong) > _SHOWN_LINES else ""
        raise DataError(f"{name}, {'; '.join(wrong[:_SHOWN_LINES])}{more}")
    return found


def _document(value: object) -> bytes | np.ndarray:
    if not isinstance(value, dict) or ("text" in value) == ("tokens" in value):
        raise ValueError('a document is {"text": "..."} or {"tokens": [...]}')
    if "text" in value:
        if not isinstance(value["text"], str):
            raise ValueError(f"text is {type(value['text']).__name__}, not a string")
        return value["text"].encode(errors="replace")
    tokens = value["tokens"]
    if not isinstance(tokens, list) or not all(_is_token(item) for item in tokens):
        raise ValueError("tokens are no list of whole numbers from 0 to 2^32 - 1")
    return np.array(tokens, np.uint32)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32
