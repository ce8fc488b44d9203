"""Schedules written by hand, drawn, and one of each kind."""

from hypothesis import strategies as st

from jaxckpt import schedules
from jaxckpt.schedules import Advance, Free, Load, Record, Reverse, Store

LETTERS = {"S": Store, "L": Load, "F": Free, "A": Advance, "R": Record, "B": Reverse}

blocks_and_slots = st.integers(1, 90).flatmap(
    lambda num_blocks: st.tuples(st.just(num_blocks), st.integers(1, num_blocks))
)


def parse(text):
    """`"S0 A0-4 R4-5 B4 L0 F0"`: Store, Advance, Record, Reverse ("back"), Load, Free."""
    words = text.split()
    return tuple(LETTERS[word[0]](*map(int, word[1:].split("-"))) for word in words)


def all_schedules(num_blocks, number):
    """One schedule of each kind that has a number to choose."""
    return (
        schedules.uniform(num_blocks, number),
        schedules.uniform(num_blocks, number, keep_last=False),
        schedules.recursive(num_blocks),
        schedules.binomial(num_blocks, number),
    )
