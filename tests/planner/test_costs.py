"""What a block costs: in a loop, whose residuals are copied, and unrolled, where they are not."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.costs.roofline import Rates
from jaxckpt.planner.kinds import kind_cost
from jaxckpt.plans import Plan
from tests.planner.steps import stacks_of

CHIP = Rates(flops_per_second=790e12, bytes_per_second=4.3e12)


def stack_of(unroll: int):
    """Returns the stack of a step, as the planner finds it."""

    def step_for(plan):
        block = lambda x, w: x + jnp.tanh(jaxckpt.tag(x @ w, "hidden"))
        run = lambda w, x: jaxckpt.scan_blocks(block, w, x, remat=plan, unroll=unroll).sum()
        return jax.grad(run), (jnp.ones([4, 64, 64]), jnp.ones([512, 64]))

    (found,) = stacks_of(step_for)
    return found


@pytest.fixture(scope="module")
def kinds():
    """Returns seconds and the rest of kinds by unrolling and plan."""
    stage = lambda plan: Plan.parse(plan).stages[0]
    return {
        (unroll, plan): kind_cost([stack_of(unroll)], stage(plan), CHIP)
        for unroll in (1, 4)
        for plan in ("none", "full", "offload:hidden")
    }


def test_keeping_costs_a_copy_in_a_loop_alone(kinds):
    assert stack_of(4).unroll == 4
    again = {u: kinds[u, "full"].seconds - kinds[u, "none"].seconds for u in (1, 4)}
    copied = kinds[1, "none"].seconds - kinds[4, "none"].seconds
    hidden_bytes = 512 * 64 * 4  # the least of what is kept, copied once
    assert copied > hidden_bytes / CHIP.bytes_per_second
    assert again[4] > again[1]
    for plan in ("none", "full"):
        assert kinds[4, plan].flops == kinds[1, plan].flops


def test_what_is_moved_is_costed_in_a_loop(kinds):
    assert dataclasses.asdict(kinds[4, "offload:hidden"]) == dataclasses.asdict(
        kinds[1, "offload:hidden"]
    )
