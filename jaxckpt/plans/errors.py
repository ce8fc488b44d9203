"""Errors that a user can mend, and the nearest guess that they offer."""

import difflib
from collections.abc import Iterable

# What is less alike than this is no guess worth making: 'nope' and 'opt' are 0.57.
CUTOFF = 0.6


class UserError(Exception):
    """What whoever asked can mend: one line on the command line, without a traceback, code 2.

    Every error of another class is a fault of the program and is shown with its traceback.
    """


class PlanError(UserError, ValueError):
    """A plan that cannot be meant: one line: what was given, what is valid, the nearest guess."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """Returns `" (did you mean 'x'?)"` for the closest valid word, or `""` if none is close."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=CUTOFF)
    return f" (did you mean {close[0]!r}?)" if close else ""


def mark(text: str, start: int, stop: int) -> str:
    """Returns `text` with the characters from `start` to `stop` marked as `>>...<<`."""
    return f"{text[:start]}>>{text[start:stop]}<<{text[stop:]}"
