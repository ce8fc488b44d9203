"""Divisors: the sizes that a chunk of tokens can have. Standard library only."""

import math
import operator
from collections.abc import Sequence


def chunk_positions(tokens_shape: Sequence[int], chunk_tokens: int) -> int:
    """Returns how many positions of every row a chunk of exactly `chunk_tokens` tokens takes.

    Args:
      tokens_shape: The axes of rows, then the axis of positions.
      chunk_tokens: The number of tokens of one chunk, all rows together.

    Raises:
      ValueError: `chunk_tokens` is no integer, or does not divide every row evenly.
    """
    *rows, length = tokens_shape
    rows = math.prod(rows)
    try:
        chunk_tokens = operator.index(chunk_tokens)
    except TypeError:
        raise ValueError(f"chunk_tokens is {chunk_tokens!r}; valid: an integer or None") from None
    if not rows * length:
        return max(length, 1)
    valid = [rows * size for size in divisors(length)]
    if chunk_tokens not in valid:
        below = [n for n in valid if n < chunk_tokens][-1:]
        above = [n for n in valid if n > chunk_tokens][:1]
        raise ValueError(
            f"chunk_tokens {chunk_tokens} does not cut {rows} rows of {length} positions evenly; "
            f"nearest valid: {', '.join(str(n) for n in below + above)}; a chunk takes a divisor "
            f"of {length} from every row"
        )
    return chunk_tokens // rows


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number, the smallest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
