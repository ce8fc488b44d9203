"""Errors that a user can correct, the nearest guess that they offer, and how they show values."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MOST_LETTERS = 80

# Words less similar than this are not offered as a guess: 'nope' and 'opt' are 0.57.
CUTOFF = 0.6


class UserError(Exception):
    """An error that the user can correct: the command line shows one line and exits with code 2.

    An error of any other class is a fault of the program and is shown with its traceback.
    """


class PlanError(UserError, ValueError):
    """A plan is not valid: one line with what was given, what is valid and the nearest guess."""


def check_word(name: str, word: object, valid: Sequence[str], error=ValueError):
    """Raises `error` for a word that is not among the valid ones, with the nearest guess."""
    if word not in valid:
        guess = nearest(str(word), valid)
        raise error(f"{name} is {word!r}; valid: {', '.join(valid)}{guess}")


def check_count(name: str, count: object, of: str = ""):
    """Raises `ValueError` unless `count` is a whole number, at least 1.

    Args:
      name: The user's name for the number.
      count: The user's number.
      of: The counted things, such as `" of blocks"`.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} is a whole number{of}, at least 1, not {shown(count)}")


def nearest(word: str, valid: Iterable[str]) -> str:
    """Returns `" (did you mean 'x'?)"` for the closest valid word, or `""` if none is close."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=CUTOFF)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shown(value: Any) -> str:
    """Returns a value as one line for errors: arrays by dtype and shape.

    >>> shown({"w": 3.5}), shown(len)
    ("{'w': 3.5}", 'len')
    """
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, list | tuple | Mapping):
        inside = value.values() if isinstance(value, Mapping) else value
        if any(hasattr(one, "dtype") for one in inside):
            return f"a {type(value).__name__} of {', '.join(map(shown, inside))}"[:_MOST_LETTERS]
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    text = " ".join(repr(value).split())
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 3]}..."


def mark(text: str, start: int, stop: int) -> str:
    """Returns `text` with the characters from `start` to `stop` marked as `>>...<<`."""
    return f"{text[:start]}>>{text[start:stop]}<<{text[stop:]}"
