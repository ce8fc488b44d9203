"""Token files: `.npy` and raw `.bin`, uint16 or uint32, memory-mapped and never read whole."""

from pathlib import Path

import numpy as np

from experiments.data.sources import DataError

SUFFIXES = (".npy", ".bin")
_CHUNK_TOKENS = 1 << 22


def map_tokens(path: Path, token_dtype: str) -> np.ndarray:
    """Returns a token file as a read-only, one-dimensional memory map.

    Args:
      path: A `.npy` file, or a `.bin` file of bare numbers.
      token_dtype: `"uint16"` or `"uint32"`, the numbers of a `.bin` file.

    Raises:
      DataError: Missing, empty, torn, or not one-dimensional uint16 or uint32.
    """
    if not path.is_file():
        raise DataError(f"--data {str(path)!r}: no such token file")
    if path.stat().st_size == 0:
        raise DataError(f"token file {str(path)!r} is empty")
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError, SyntaxError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"token file {str(path)!r} is not a readable .npy: {reason}") from None
    else:
        size = np.dtype(token_dtype).itemsize
        if path.stat().st_size % size:
            raise DataError(
                f"token file {str(path)!r} has {path.stat().st_size} bytes, which is no whole "
                f"number of {token_dtype}; --token-dtype says uint16 or uint32"
            )
        tokens = np.memmap(path, dtype=token_dtype, mode="r")
    if tokens.ndim != 1 or tokens.dtype.name not in ("uint16", "uint32"):
        raise DataError(
            f"token file {str(path)!r} holds {tokens.dtype}{list(tokens.shape)}; "
            "one-dimensional uint16 or uint32 is needed"
        )
    if tokens.size == 0:
        raise DataError(f"token file {str(path)!r} is empty")
    return tokens


def chunks(tokens: np.ndarray):
    """Yields consecutive parts of a token array, small enough to hold in memory."""
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        yield tokens[start : start + _CHUNK_TOKENS]
