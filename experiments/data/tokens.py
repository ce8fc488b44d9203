"""Token files: `.npy` and raw `.bin`, uint16 or uint32, memory-mapped and never read whole."""

import hashlib
import tokenize
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.data.sources import DataError
from jaxckpt.plans.errors import nearest

SUFFIXES = (".npy", ".bin")
TOKEN_DTYPES = ("uint16", "uint32")
_CHUNK_TOKENS = 1 << 22


def map_tokens(path: Path, token_dtype: str) -> np.ndarray:
    """Returns a token file as a read-only, one-dimensional memory map.

    Args:
      path: A `.npy` file, or a `.bin` file of bare numbers.
      token_dtype: `"uint16"` or `"uint32"`, the numbers of a `.bin` file.

    Raises:
      DataError: Empty, torn, or not one-dimensional uint16 or uint32.
    """
    if token_dtype not in TOKEN_DTYPES:
        raise DataError(
            f"--token-dtype {token_dtype!r} is not one of {', '.join(TOKEN_DTYPES)}"
            f"{nearest(token_dtype, TOKEN_DTYPES)}"
        )
    if path.stat().st_size == 0:
        raise DataError(f"token file {str(path)!r} is empty")
    try:
        tokens = _map_npy(path) if path.suffix == ".npy" else _map_bin(path, token_dtype)
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from None
    if tokens.ndim != 1 or tokens.dtype.name not in TOKEN_DTYPES:
        raise DataError(
            f"token file {str(path)!r} holds {tokens.dtype}{list(tokens.shape)}; "
            "one-dimensional uint16 or uint32 is needed"
        )
    if tokens.size == 0:
        raise DataError(f"token file {str(path)!r} is empty")
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


def _map_npy(path: Path) -> np.ndarray:
    # Not np.load, which opens an archive (.npz) under any name and unpickles where it is let.
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
