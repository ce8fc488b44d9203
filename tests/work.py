"""How much work a call is, told without a clock: a busy machine counts as an idle one does."""

import sys
from collections.abc import Callable
from typing import Any


def calls_of(fn: Callable[[], Any]) -> tuple[Any, int]:
    """Returns what a function returns, and how many calls of Python and C functions it made."""
    count = 0

    def watch(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        found = fn()
    finally:
        sys.setprofile(before)
    return found, count
