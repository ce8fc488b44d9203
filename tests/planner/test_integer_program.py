"""The programs that blocks are made into: what bytes are to the solver, and what it does not do."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxckpt.costs.roofline import Rates
from jaxckpt.planner.inside_block import grain, minimize
from jaxckpt.planner.kinds import find_kinds
from jaxckpt.planner.stacks import given_stack


def test_a_block_whose_program_was_once_given_up():
    """Bytes were MiB to the solver, and one byte less was within its tolerance: it failed."""

    def decode(y, w, memory):
        return y + jnp.sin(jnp.tanh(y @ w) * jnp.cos(memory @ w)) @ w.T

    rates = Rates(
        flops_per_second=791.52e12,
        bytes_per_second=4.32e12,
        host_bytes_per_second=56.7e9,
        host_overlaps=False,
    )
    shapes = ((1024, 2048), (16384, 1024), (16384, 1024))
    args = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    kinds, _ = find_kinds([given_stack((decode, *args), 6)], rates, host_bytes=8 * 2**30)
    assert {"none", "full"} <= {str(kind) for kind in kinds}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([64, 96, 0], 32),
        ([2**30, 2**30 + 2**20], 2**20),
        ([2**30, 2**30 + 4], (2**31 + 4) / 2**20),
        ([0, 0], 1),
        ([], 1),
    ],
)
def test_one_unit_tells_any_two_sizes_apart_unless_it_were_tiny(sizes, expected):
    assert grain(sizes) == expected


def knapsack(room: float):
    """The cheapest of three things that are not all left out."""
    values, sizes = np.array([5.0, 4.0, 3.0]), np.array([[4.0, 3.0, 2.0]])
    least = scipy.optimize.LinearConstraint(np.ones((1, 3)), lb=1.0)
    most = scipy.optimize.LinearConstraint(sizes, ub=room)
    return {"cost": values, "constraints": [least, most], "upper": 1.0, "integrality": np.ones(3)}


def test_the_optimum():
    assert list(minimize(**knapsack(4.0))) == [0, 0, 1]
    assert minimize(**knapsack(1.0)) is None


def test_a_failed_presolve_is_left_out(monkeypatch):
    solve, asked = scipy.optimize.milp, []

    def milp(*args, options, **kwargs):
        asked.append(options.get("presolve", True))
        if asked[-1]:
            return SimpleNamespace(status=4, x=None, message="Solve error")
        return solve(*args, options=options, **kwargs)

    monkeypatch.setattr(scipy.optimize, "milp", milp)
    assert list(minimize(**knapsack(4.0))) == [0, 0, 1]
    assert asked == [True, False]


def test_a_solver_that_gives_up_says_why(monkeypatch):
    failed = SimpleNamespace(status=4, x=None, message="Solve error")
    monkeypatch.setattr(scipy.optimize, "milp", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="program of a block has no answer: Solve error"):
        minimize(**knapsack(4.0))
