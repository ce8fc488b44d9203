"""How often a loop runs whose number of trips is not in the jaxpr.

The executor's loops read their bounds from a table, so a jaxpr shows a `while` without a count. The
executor knows the totals; it writes them into the name stack, where a FLOP counter finds them.
"""

import fractions
import re

import jax
from jax.extend import core

_PREFIX = "jaxckpt_trips_"
_PATTERN = re.compile(_PREFIX + r"([0-9]+)_of_([0-9]+)")
_OF_LOOP = re.compile(_PATTERN.pattern + "/while$")


def trips(total: int, runs: int):
    """Returns a context in which one loop is made that makes `total` trips in `runs` runs."""
    return jax.named_scope(f"{_PREFIX}{total}_of_{max(runs, 1)}")


def mean_trips(equation: core.JaxprEqn) -> fractions.Fraction:
    """Returns the trips of a `while` in one run of it, on average; 1 where nobody said."""
    found = _PATTERN.findall(str(equation.source_info.name_stack))
    return fractions.Fraction(*map(int, found[-1])) if found else fractions.Fraction(1)


def says_trips(op_name: str) -> bool:
    """Returns whether the name of a compiled loop says its own trips, in whatever form."""
    return any(_PREFIX in part for part in op_name.split("/")[-2:])


def trips_of_name(op_name: str) -> fractions.Fraction | None:
    """Returns the same of a compiled loop, by its operation's name; None where nobody said."""
    found = _OF_LOOP.search(op_name)
    return fractions.Fraction(*map(int, found.groups())) if found else None
