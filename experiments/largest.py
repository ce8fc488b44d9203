"""The largest size whose peak fits, found with few compilations."""

from collections.abc import Callable
from typing import TypeVar

from experiments.config import ConfigError

Answer = TypeVar("Answer")
_MOST_GROWTH = 8  # in one step, where the line through two sizes promises more
_MOST = 1 << 20


def largest_that_fits(peak: Callable[[int], tuple[int, int | None]], *, start: int = 1) -> int:
    """Returns the largest size that fits, 0 if not even 1 does.

    The peak of a step is nearly a straight line in batch and sequence, so the next size to try is
    where the line through the last two meets the limit. The answer is verified: it fits, and the
    next size does not. A peak that falls as the size grows is not looked for.

    Args:
      peak: Of a size, `(peak_bytes, usable_bytes)`.
      start: Where to begin.

    Raises:
      ConfigError: What the device can use is not known.
    """
    seen: dict[int, int] = {}
    fits, fails, size = 0, None, start
    while True:
        seen[size], usable = peak(size)
        if usable is None:
            raise ConfigError(
                "--max needs a target that says what it can use; name one, such as v5e-1 or "
                "h100, or give a --budget"
            )
        if seen[size] <= usable:
            fits = max(fits, size)
        else:
            fails = size if fails is None else min(fails, size)
        if fails == fits + 1 or fits >= _MOST:
            return fits
        size = _next(seen, usable, fits, fails)


def grown(plan: Callable[[int], Answer | None], count: int) -> tuple[int, Answer | None]:
    """Returns the largest size for which there is an answer, and the answer.

    Args:
      plan: Returns what is found for a size, or None.
      count: Where to begin: a size that is likely to be the largest; 0 if none is likely.
    """
    found, last = None, count
    while last > 0 and (found := plan(last)) is None:
        last -= 1
    if last < count:
        return last, found
    while (more := plan(last + 1)) is not None:
        last, found = last + 1, more
    return last, found


def _next(seen: dict[int, int], usable: int, fits: int, fails: int | None) -> int:
    """Returns a size between the largest that fits and the least that does not, both left out."""
    guess = _on_the_line(seen, usable)
    if guess is None:
        guess = 2 * fits if fails is None else fails // 2
    highest = fits * _MOST_GROWTH if fails is None else fails - 1
    guess = min(max(guess, fits + 1), highest)
    if len(seen) > 8 and fails is not None:  # no line after all
        guess = (fits + fails) // 2
    return guess


def _on_the_line(seen: dict[int, int], usable: int) -> int | None:
    """Returns where the line through the two sizes nearest to the limit meets it."""
    if len(seen) < 2:
        return None
    (one, low), (two, high) = sorted(seen.items(), key=lambda item: abs(item[1] - usable))[:2]
    slope = (high - low) / (two - one)
    return None if slope <= 0 else int(one + (usable - low) / slope)
