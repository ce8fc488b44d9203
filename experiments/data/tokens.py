"""Token files: `.npy` and raw `.bin`, uint16 or uint32, memory-mapped."""

import hashlib
import tokenize
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.data.sources import DataError
from jaxckpt.plans.errors import check_word

TOKEN_DTYPES = ("uint16", "uint32")
_CHUNK_TOKENS = 1 << 22


def map_tokens(path: Path, token_dtype: str | None, vocab_size: int | None = None) -> np.ndarray:
    """Returns a token file as a read-only, one-dimensional memory map.

    Args:
      path: A NumPy file, or a file of bare numbers.
      token_dtype: The dtype of bare numbers, `"uint16"` or `"uint32"`; None for a NumPy file.
      vocab_size: The size of the model's vocabulary; None if unknown.

    Raises:
      DataError: The file is empty or incomplete, is not one-dimensional uint16 or uint32, or its
        numbers are not of `token_dtype`.
    """
    if token_dtype is not None:
        check_word("--token-dtype", token_dtype, TOKEN_DTYPES, DataError)
    if path.stat().st_size == 0:
        raise DataError(f"token file {str(path)!r} is empty")
    try:
        tokens = _map_npy(path) if token_dtype is None else _map_bin(path, token_dtype)
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from None
    if tokens.ndim != 1 or tokens.dtype.name not in TOKEN_DTYPES:
        raise DataError(
            f"token file {str(path)!r} holds {tokens.dtype}{list(tokens.shape)}; "
            "one-dimensional uint16 or uint32 is needed"
        )
    if tokens.size == 0:
        raise DataError(f"token file {str(path)!r} is empty")
    if token_dtype is not None:
        _check_width(path, tokens, vocab_size)
    return tokens


def chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Yields consecutive parts of a token array, small enough to hold in memory."""
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        yield tokens[start : start + _CHUNK_TOKENS]


def scan(tokens: np.ndarray) -> tuple[str, int]:
    """Returns the sha256 of the numbers and the largest of them, in one pass over the file."""
    digest, largest = hashlib.sha256(tokens.dtype.str.encode()), 0
    for chunk in chunks(tokens):
        digest.update(chunk.tobytes())
        largest = max(largest, int(chunk.max()))
    return digest.hexdigest(), largest


def _check_width(path: Path, tokens: np.ndarray, vocab_size: int | None):
    """Raises if numbers that are read as uint16 must be uint32: by the vocabulary, or by zeros."""
    if tokens.dtype != np.uint16:
        return
    if vocab_size is not None and vocab_size > 2**16:
        raise DataError(
            f"token file {str(path)!r} is read as uint16, which ends at 65535, but the model's "
            f"vocabulary ends at {vocab_size - 1}; --token-dtype uint32 reads wider numbers"
        )
    halves = [any(chunk[half::2].any() for chunk in chunks(tokens)) for half in (0, 1)]
    if tokens.size % 2 == 0 and halves[0] != halves[1]:
        raise DataError(
            f"token file {str(path)!r} is read as uint16, but every second number is 0, as in "
            "uint32; --token-dtype uint32 reads it"
        )


def _map_npy(path: Path) -> np.ndarray:
    # `np.load` would also open an archive (.npz) under any name.
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, SyntaxError, OverflowError, tokenize.TokenError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"token file {str(path)!r} is not a readable .npy: {reason}") from None


def _map_bin(path: Path, token_dtype: str) -> np.ndarray:
    size, item = path.stat().st_size, np.dtype(token_dtype).itemsize
    if size % item:
        raise DataError(
            f"token file {str(path)!r} has {size} bytes, not a multiple of the {item} bytes of "
            f"{token_dtype}; --token-dtype says uint16 or uint32"
        )
    return np.memmap(path, dtype=token_dtype, mode="r")
