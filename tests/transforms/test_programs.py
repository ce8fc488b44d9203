"""Programs that differ in numbers alone become one."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from jaxckpt.transforms.programs import one_program, without_numbers

X = jnp.linspace(-1, 1, 6)
KEY = jax.random.key(0)


def programs_of(*fns):
    return [jax.make_jaxpr(fn)(X, KEY) for fn in fns]


def drawing(number, scale=1.0):
    def fn(x, key):
        return jnp.sin(2.0 * x) + scale * jax.random.normal(jax.random.fold_in(key, number), (6,))

    return fn


def test_numbers_become_inputs():
    """Those that differ: the number that is folded in, and not the two."""
    fns = [drawing(number) for number in (3, 7, 2**32 - 1)]
    programs = programs_of(*fns)
    assert len({*map(without_numbers, programs)}) == 1
    program, rows = one_program(programs)
    assert [[int(x) for x in row] for row in rows] == [[3], [7], [2**32 - 1]]
    for fn, row in zip(fns, rows, strict=True):
        (found,) = core.jaxpr_as_fun(program)(X, KEY, *row)
        assert jnp.array_equal(found, fn(X, KEY))


def test_arrays_that_a_program_closes_over_are_inputs():
    weights = [jnp.full(6, value) for value in (1.0, 2.0)]
    programs = programs_of(*(lambda x, _, w=w: x * w for w in weights))
    program, rows = one_program(programs)
    found = [core.jaxpr_as_fun(program)(X, KEY, *row)[0] for row in rows]
    assert jnp.array_equal(jnp.stack(found), jnp.stack([X, 2 * X]))


@pytest.mark.parametrize(
    "other",
    [
        lambda x, key: jnp.cos(2.0 * x) + jax.random.normal(jax.random.fold_in(key, 3), (6,)),
        lambda x, key: x,
        # The number is inside of another program.
        jax.checkpoint(drawing(3)),
    ],
)
def test_other_differences_are_seen(other):
    one, same, different = map(without_numbers, programs_of(drawing(3), drawing(4), other))
    assert one == same != different


def test_numbers_of_inner_programs_are_not_reached():
    fns = map(jax.checkpoint, (drawing(3), drawing(3), drawing(4)))
    one, same, different = map(without_numbers, programs_of(*fns))
    assert one == same != different
