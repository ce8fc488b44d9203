"""Programs that differ only in numbers become one program, which takes the numbers as inputs.

    program, rows = one_program(jaxprs)

The layers of a Linen list are such programs: each layer folds a number, which Flax makes from the
layer's path, into its dropout key. One loop runs all layers, with a row of numbers for each layer.
"""

import itertools
from collections.abc import Hashable, Sequence

import numpy as np
from jax.extend import core

from jaxckpt.transforms.traced_block import text_of
from jaxckpt.transforms.value_names import is_var


def without_numbers(program: core.ClosedJaxpr) -> Hashable:
    """Returns a key that is equal for two programs that differ only in numbers."""
    jaxpr, _ = _opened(program)
    return text_of(jaxpr), tuple(var.aval for var in jaxpr.invars)


def one_program(programs: Sequence[core.ClosedJaxpr]) -> tuple[core.ClosedJaxpr, list[list]]:
    """Returns one program for all, and for each program the inputs that come after its own.

    These inputs are the program's consts, then its numbers. A number that is equal in all programs
    stays a number of the program.

    Args:
      programs: At least one program; `without_numbers` is equal for all of them.
    """
    numbers = [_opened(program)[1] for program in programs]
    places = {i for i, same in enumerate(zip(*numbers, strict=True)) if len({*map(_key, same)}) > 1}
    opened = [_opened(program, places) for program in programs]
    rows = [[*one.consts, *own] for one, (_, own) in zip(programs, opened, strict=True)]
    return core.ClosedJaxpr(opened[0][0], ()), rows


def _opened(
    program: core.ClosedJaxpr, places: set[int] | None = None
) -> tuple[core.Jaxpr, list[np.ndarray]]:
    """Returns a program with its consts and numbers as last inputs, and the numbers.

    Args:
      program: Any program.
      places: The numbers that become inputs, by their order in the program; None for all.
    """
    jaxpr, made, numbers, count = program.jaxpr, [], [], itertools.count()

    def as_input(atom):
        if is_var(atom):
            return atom
        place = next(count)
        if places is not None and place not in places:
            return atom
        made.append(core.Var(atom.aval))
        numbers.append(np.asarray(atom.val, atom.aval.dtype))
        return made[-1]

    equations = [one.replace(invars=[as_input(atom) for atom in one.invars]) for one in jaxpr.eqns]
    outputs = [as_input(atom) for atom in jaxpr.outvars]
    opened = jaxpr.replace(
        constvars=[],
        invars=[*jaxpr.invars, *jaxpr.constvars, *made],
        eqns=equations,
        outvars=outputs,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return opened, numbers


def _key(number: np.ndarray) -> bytes:
    return number.tobytes()
