"""The planner for a TPU that is not there."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.absent.jobs import Entry
from jaxckpt.planner.absent import fit_entry
from tests.planner import steps

pytest.importorskip("libtpu")

NUM_BLOCKS = 4


def step_for(plan):
    """Returns gradients of a stack with almost no weights; arrays too large for on-chip memory."""
    block = lambda x, scale: jnp.sin(jaxckpt.tag(jnp.tanh(x * scale), "inner")) * x
    loss = lambda s, x: jaxckpt.scan_blocks(block, s, x, remat=plan).sum()
    shapes = ((NUM_BLOCKS, 1), (4096, 4096))
    return jax.grad(loss), tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCKPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield functools.partial(jaxckpt.fit, step_for, num_blocks=NUM_BLOCKS, target="v5e-1")


@pytest.mark.slow
def test_an_absent_tpu(fit):
    peak_of = lambda plan: jaxckpt.measure(*_flat(step_for(plan)), target="v5e-1").peak_bytes
    with pytest.raises(jaxckpt.BudgetError) as caught:
        fit(budget="1MiB")
    least, none = caught.value.least_bytes, peak_of("none")
    middle = fit(budget=(least + none) // 2)
    top = fit(budget="auto")
    assert least <= middle.report.peak_bytes <= middle.budget_bytes
    assert middle.report.peak_bytes == peak_of(middle.plan)
    assert top.budget_bytes == middle.report.usable_bytes
    assert top.report.peak_bytes >= middle.report.peak_bytes
    assert top.chosen.seconds <= middle.chosen.seconds


def _flat(step):
    fn, args = step
    return fn, *args


@pytest.mark.heavy
def test_the_host_makes_room(fit):
    """What no plan fits on the device alone, a plan fits that moves the blocks' inputs out."""
    with pytest.raises(jaxckpt.BudgetError) as caught:
        fit(budget="1MiB")
    carry = 4 * 4096 * 4096
    budget = caught.value.least_bytes - carry // 2
    found = fit(budget=budget, host_budget=f"{NUM_BLOCKS * carry}B")
    assert found.report.peak_bytes <= budget
    assert 0 < found.report.host_bytes <= found.host_budget_bytes
    assert "offload" in str(found.plan) and found.chosen.host_bytes > 0
    assert "gradients not checked, as the chip is not here" in str(found)


@pytest.mark.heavy
def test_a_host_with_little_room_gets_a_schedules_carries(tmp_path, monkeypatch):
    """Neither device nor host has room for every block's input; some on the host are the fastest.

    On the device alone the stack is run forward more often. A block is about as much work as its
    input takes to travel.
    """
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))
    num_blocks, carry = 16, 4 * 4096 * 4096

    def working_step_for(plan):
        def loss(scales, x, mix):
            block = lambda x, scale: jnp.sin(functools.reduce(jnp.matmul, [mix] * 4, x * scale))
            return jaxckpt.scan_blocks(block, scales, x, remat=plan).sum()

        shapes = ((num_blocks, 1), (4096, 4096), (4096, 4096))
        args = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        return jax.grad(loss, argnums=(0, 2)), args

    fn, args = working_step_for(jaxckpt.Plan.parse("binomial:2"))
    budget = jaxckpt.measure(fn, *args, target="v5e-1").peak_bytes + 2**20
    fit = functools.partial(
        jaxckpt.fit, working_step_for, num_blocks=num_blocks, target="v5e-1", budget=budget
    )
    found = fit(host_budget=6 * carry)
    stage = found.plan.stages[0]
    assert stage.schedule not in ("none", "full") and stage.offloads_carry
    assert found.report.peak_bytes <= budget
    assert 0 < found.report.host_bytes <= 6 * carry
    assert found.chosen.host_bytes == pytest.approx(found.report.host_bytes, rel=1e-3)
    little = fit(host_budget=carry)
    assert little.report.host_bytes <= carry
    assert not any(
        s.schedule not in ("none", "full") and s.offloads_carry for s in little.plan.stages
    )
    assert found.chosen.seconds < little.chosen.seconds


@pytest.mark.heavy
def test_two_stacks_of_an_entry_point_share_the_host(tmp_path, monkeypatch):
    """Less than both need on the device alone is enough with some of both on the host."""
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))
    entry = Entry(function="tests.planner.steps:both")
    fit = functools.partial(fit_entry, entry, num_blocks=steps.BOTH, target="v5e-1")
    with pytest.raises(jaxckpt.BudgetError) as caught:
        fit(budget="1MiB")
    assert caught.value.plan.keys() == steps.BOTH.keys()
    carry = 4 * steps.SIDE**2
    budget, host = caught.value.least_bytes - carry // 2, sum(steps.BOTH.values()) * carry
    found = fit(budget=budget, host_budget=host)
    assert found.report.peak_bytes <= budget
    assert 0 < found.report.host_bytes <= host
    assert any("offload:" in str(plan) for plan in found.plan.values())
    assert found.chosen.host_bytes == pytest.approx(found.report.host_bytes, rel=0.01)
    assert fit(budget=budget, host_budget=host) == found, "from disk"
