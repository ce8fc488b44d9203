"""Bad input to the planner: one line each, before anything is compiled where that can be."""

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from tests.planner import steps


def fit(step_for=steps.step_for, **options):
    return jaxckpt.fit(step_for, **({"num_blocks": steps.NUM_BLOCKS, "budget": "1MiB"} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget: size 0 is not at least one byte"),
        ({"budget": "15GB!"}, "budget: size '15GB!' is not a number of bytes"),
        ({"budget": "15Gib2"}, "budget: size '15Gib2' is not a number"),
        ({"budget": "3GiBs"}, "unit 'GiBs'.*GiB"),
        ({"budget": "auto"}, "budget 'auto' is what the target can use, which local does not"),
        ({"num_blocks": 0}, "num_blocks is a whole number of blocks, at least 1, not 0"),
        ({"num_blocks": True}, "num_blocks is a whole number of blocks, at least 1, not True"),
        ({"target": "v5f-1"}, "target 'v5f-1' is not known"),
        ({"step_for": 3}, "step_for is a function"),
        ({"step_for": lambda plan: 3}, "returns .fn, args."),
        ({"step_for": lambda plan: (jnp.sin, (1.0,), {"donate": 0})}, "option 'donate'"),
        ({"num_blocks": 5}, "num_blocks is 5, but the step runs a stack of 6"),
        ({"block": 3}, "block is .block, params_i, carry"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        fit(**options)
    assert "\n" not in str(caught.value)


def test_a_step_that_fixes_its_plan():
    with pytest.raises(ValueError, match=r"ignores its plan: asked for 'full'.*under 'sqrt'"):
        fit(lambda plan: steps.step_for("sqrt"))


def test_a_step_without_a_stack():
    same = lambda plan: (jax.grad(lambda x: jnp.sin(x).sum()), (jnp.ones(3),))
    with pytest.raises(ValueError, match="ignores its plan: the program is the same"):
        fit(same)

    def loop(plan):
        block = jnp.sin if str(plan) == "none" else jax.checkpoint(jnp.sin)
        return jax.grad(lambda x: block(block(x)).sum()), (jnp.ones(3),)

    with pytest.raises(ValueError, match=r"runs no scan_blocks.*block="):
        fit(loop)


@pytest.mark.slow
def test_a_budget_below_the_weights():
    with pytest.raises(jaxckpt.BudgetError, match="no plan fits") as caught:
        fit(budget="2KB")
    error = caught.value
    assert error.least_bytes == error.report.peak_bytes == sum(error.parts.values())
    assert str(error.plan) in str(error)
    assert "arguments[0]" in str(error) and "the largest buffer there" in str(error)
    assert "\n" not in str(error)


def test_more_than_the_chip_has_is_a_warning():
    with (
        pytest.warns(UserWarning, match="100.00 GiB is more than the 15.75 GiB"),
        pytest.raises(ValueError, match="step_for"),
    ):
        fit(lambda plan: 3, target="v5e-1", budget="100GiB")
