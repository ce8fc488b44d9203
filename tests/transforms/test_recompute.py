"""The twins of test_equality.py: they fail if remat did nothing."""

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt import schedules
from jaxckpt.costs.flops import count_flops
from jaxckpt.plans import Plan
from jaxckpt.schedules.of_stage import log_slots, stack_schedule_of, under_loss
from jaxckpt.schedules.segments import two_level
from tests.transforms import cases

LENGTHS = (1, 2, 3, 5, 8, 13)


def executed(num_blocks: int, schedule) -> int:
    """The counting rule: L forward, and the schedule's extra ones with its loss behind it."""
    ran = num_blocks + under_loss(schedule).extra_forwards
    assert ran == num_blocks + schedule.extra_forwards + 1
    return ran


def no_remat(num_blocks):
    return num_blocks


EVALUATIONS = {
    "none": no_remat,
    "full": lambda n: 2 * n,
    "uniform:1": no_remat,  # one segment, kept from the forward pass
    "uniform:{n}": lambda n: 2 * n - schedules.segment_sizes(n, max(1, min(3, n - 1)))[-1],
    "sqrt": lambda n: executed(n, two_level(n)),
    "log": lambda n: executed(n, schedules.binomial(n, log_slots(n))),
    "binomial:1": lambda n: executed(n, schedules.binomial(n, 1)),
    "binomial:{n}": lambda n: executed(n, schedules.binomial(n, max(1, min(3, n - 1)))),
}


@pytest.mark.parametrize("num_blocks", LENGTHS)
@pytest.mark.parametrize("pattern", EVALUATIONS)
def test_block_evaluations_at_run_time(pattern, num_blocks):
    counter = cases.count_evaluations(num_blocks, cases.plan_for(pattern, num_blocks))
    assert counter.total == EVALUATIONS[pattern](num_blocks), counter.counts


@pytest.mark.parametrize("num_blocks", (4, 9))
def test_nested_evaluations(num_blocks):
    """One forward pass more for each level, and none for the levels of `jax.checkpoint` alone."""
    count = lambda plan: cases.count_evaluations(num_blocks, plan, nested=True).total
    assert count("uniform:2") == 2 * num_blocks
    assert count("sqrt") == 3 * num_blocks


def flops(plan: str, num_blocks: int = 6) -> int:
    params, carry, scale = cases.dropout_stack(num_blocks)
    fn = cases.value_and_grads(cases.dropout_block, params, carry, scale, remat=plan)
    return count_flops(fn.trace(params, carry, scale).jaxpr)


def test_policies_recompute_the_matmuls_they_do_not_keep():
    """A block has two products; one (into `hidden`) is needed again by the backward pass."""
    product = 2 * cases.BATCH * cases.WIDTH * 2 * cases.WIDTH
    none = flops("none")
    assert none == 6 * 6 * product
    assert flops("full") == none + 6 * product
    assert flops("dots") == flops("dots_no_batch") == none
    assert flops("names:hidden") == flops("offload:hidden") == none
    assert flops("2xnone/full") == none + 4 * product


@pytest.mark.parametrize("plan", ["uniform:2", "uniform:6", "sqrt", "log", "binomial:1"])
def test_the_executors_flops_are_those_of_its_schedule(plan):
    """A block that only runs forward makes one product, a reversed one that and two more."""
    w, x = jnp.ones((6, 16, 16)), jnp.ones((4, 16))

    def block(x, w):
        return jnp.tanh(x @ w)  # its derivative reads the product

    loss = lambda w, x: jaxckpt.scan_blocks(block, w, x, remat=plan).sum()
    found = count_flops(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(w, x))
    schedule = stack_schedule_of(Plan.parse(plan).bind(6).stages[0])
    assert found == (6 * 3 + schedule.extra_forwards) * 2 * 4 * 16 * 16


def residual_bytes(plan: str, num_blocks: int = 8) -> int:
    """Returns the bytes that the backward pass of a stack is handed, parameters left out."""
    w = jnp.ones((num_blocks, 16, 16))

    def block(x, w):
        return jnp.tanh(jaxckpt.tag(x @ w, "product")) + x

    saved = jax.eval_shape(
        lambda *args: jax.vjp(lambda w, x: jaxckpt.scan_blocks(block, w, x, remat=plan), *args)[1],
        w,
        jnp.ones((4, 16)),
    )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(saved)) - w.size * 4


def test_saved_bytes_are_exact():
    carry = 4 * 16 * 4
    assert residual_bytes("full") == 8 * carry
    assert residual_bytes("names:product") == 16 * carry
    # x and tanh of every block; before jax 0.12 its derivative keeps 1 - tanh as well.
    kept = 16 if jax.__version_info__ >= (0, 12) else 24
    assert residual_bytes("none") == kept * carry
    # Executor: the slots, one more for the last block's input; segments keep their residuals.
    assert residual_bytes("binomial:3") == 4 * carry
    assert residual_bytes("log") == 5 * carry
    assert residual_bytes("sqrt") == (2 + 2 + 1) * carry


def test_the_twins_see_a_remat_that_does_nothing(monkeypatch):
    """With the transforms replaced by the identity, every twin above goes red."""
    from jaxckpt.transforms import checkpointed, scan, stack_executor

    monkeypatch.setattr(jax, "checkpoint", lambda fn, **_: fn)
    monkeypatch.setattr(stack_executor, "runs", lambda _: False)
    assert scan.stack_executor is stack_executor and scan.reference is checkpointed
    assert cases.count_evaluations(8, "full").total == 8
    assert cases.count_evaluations(9, "sqrt").total == 9
    with pytest.raises(AssertionError):
        test_policies_recompute_the_matmuls_they_do_not_keep()
    with pytest.raises(AssertionError):
        test_saved_bytes_are_exact()
    for pattern in ("full", "sqrt", "log"):
        with pytest.raises(AssertionError):
            test_block_evaluations_at_run_time(pattern, 8)
