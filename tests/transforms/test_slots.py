"""Carries that a schedule keeps on the host: what crosses the link, and that no more does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt.absent.jobs import Entry, measure_entry
from jaxckpt.costs.flops import count_flops
from jaxckpt.costs.roofline import Rates, estimate
from jaxckpt.plans import Plan
from jaxckpt.schedules.of_stage import stack_schedule_of
from jaxckpt.transforms.tables import make_table
from tests.absent.test_absent import needs_tpu

NUM_BLOCKS, SHAPE = 9, (4, 16)
CARRY = 4 * 4 * 16
PLANS = ("uniform:3", "every:2", "sqrt", "log", "binomial:3")


def gradient(plan: str):
    """Returns a stack's gradient and its arguments."""
    loss = lambda w, x: jaxckpt.scan_blocks(lambda x, w: jnp.sin(x @ w) * x, w, x, remat=plan).sum()
    shapes = ((NUM_BLOCKS, 16, 16), SHAPE)
    return jax.grad(loss), tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)


def moved_bytes(plan: str) -> float:
    """Returns what crosses the link in both directions together."""
    fn, args = gradient(plan)
    rates = Rates(flops_per_second=1.0, bytes_per_second=1.0, host_bytes_per_second=1.0)
    return estimate(jax.make_jaxpr(fn)(*args), rates).host_seconds


@pytest.mark.parametrize("plan", PLANS)
def test_a_carry_crosses_the_link_once_a_store_and_once_a_load(plan):
    schedule = stack_schedule_of(Plan.parse(plan).bind(NUM_BLOCKS).stages[0])
    table = make_table(schedule)
    is_uniform = plan.startswith(("uniform", "every"))
    stop = int(table.rows["record"][0]) if is_uniform else NUM_BLOCKS
    # A first row whose blocks the forward pass has recorded loads nothing where it runs by itself.
    loads = len(table.rows["load"]) - (table.keeps_last and len(table.loops) > 1)
    crossings = len(table.sweep_stores(stop)) + table.num_moves + loads
    number = 4  # the slots are made from it
    assert moved_bytes(plan) == 0
    assert moved_bytes(plan + "+offload:carry") == crossings * CARRY + number
    assert len(table.sweep_stores(stop)) <= table.num_slots


@pytest.mark.parametrize("plan", PLANS)
def test_the_slots_are_never_on_the_device(plan):
    """Compiled for a TPU, what is told to be on the host is a number or one carry."""
    fn, args = gradient(plan + "+offload:carry")
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    placed = [line for line in text.splitlines() if "annotate_device_placement" in line]
    moved = [line.rpartition("-> ")[2] for line in placed if '"pinned_host"' in line]
    assert set(moved) == {"tensor<f32>", "tensor<4x16xf32>"}
    assert any('"device"' in line for line in placed)


@pytest.mark.parametrize("plan", ["uniform:3", "binomial:3"])
def test_sweeps_run_no_block_twice(plan):
    found = {}
    for text in (plan, plan + "+offload:carry"):
        fn, args = gradient(text)
        found[text] = count_flops(jax.make_jaxpr(fn)(*args))
    assert len(set(found.values())) == 1, found


def test_stores_of_a_sweep():
    table = make_table(stack_schedule_of(Plan.parse("uniform:3").bind(NUM_BLOCKS).stages[0]))
    assert table.sweep_stores(6) == [(0, 3, 0), (3, 5, 1), (5, 6, 2)]


def test_carries_of_any_dtype_go_there_and_back():
    """Keys stay where they are, and nothing is nothing on the host too."""

    def block(carry, w):
        noise = jax.random.normal(jax.random.fold_in(carry["key"], carry["n"]), SHAPE)
        moved = {"x": jnp.sin(carry["x"] @ w) + noise, "n": carry["n"] + 1}
        return carry | moved

    carry = {
        "x": jnp.ones(SHAPE),
        "n": jnp.int32(0),
        "empty": jnp.ones((0, 3), jnp.bfloat16),
        "key": jax.random.key(0),
    }
    w = 0.3 * jax.random.normal(jax.random.key(1), (NUM_BLOCKS, 16, 16))
    of = lambda plan: jax.jit(
        jax.grad(lambda w: jaxckpt.scan_blocks(block, w, carry, remat=plan)["x"].sum())
    )
    np.testing.assert_array_equal(of("binomial:3+offload:carry")(w), of("full")(w))


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["uniform:3", "log", "uniform:3+offload:hidden"])
def test_gradients_of_each_example_of_what_is_on_the_host(plan):
    """`vmap` outside the gradient batches the slots themselves; twice, and of weights alone."""
    plan = plan if "offload" in plan else plan + "+offload:carry"
    block = lambda x, w: x + jnp.sin(jaxckpt.tag(x @ w, "hidden"))
    ws = 0.3 * jax.random.normal(jax.random.key(0), (2, NUM_BLOCKS, 16, 16))
    xs = jax.random.normal(jax.random.key(1), (3, 2, 4, 16))

    def each(plan):
        loss = lambda w, x: jnp.sin(jaxckpt.scan_blocks(block, w, x, remat=plan)).sum()
        inner = jax.vmap(jax.grad(loss, (0, 1)), (0, None))
        return jax.jit(jax.vmap(inner, (None, 1)))(ws, xs)

    for got, want in zip(each(plan), each("none"), strict=True):
        assert jnp.abs(got - want).max() <= 1e-5 * jnp.abs(want).max()


@pytest.mark.parametrize("plan", ["uniform:1", "every:9", "8xnone/uniform:1"])
def test_a_single_segment_has_nothing_to_store(plan):
    w = 0.3 * jax.random.normal(jax.random.key(0), (NUM_BLOCKS, 16, 16))
    of = lambda plan: jax.jit(gradient(plan)[0])(w, jnp.ones(SHAPE))
    np.testing.assert_allclose(of(plan + "+offload:carry"), of("none"), rtol=1e-5, atol=1e-6)


def test_a_second_derivative_says_what_has_it():
    args = gradient("log")[1]
    hvp = lambda plan: jax.eval_shape(lambda *a: jax.jvp(gradient(plan)[0], a, a)[1], *args)
    with pytest.raises(NotImplementedError, match=r"without it has, and so has full\+offload"):
        hvp("log+offload:carry")
    assert hvp("log").shape == hvp("full+offload:carry").shape == args[0].shape


@needs_tpu
@pytest.mark.heavy
def test_a_compiler_keeps_the_slots_on_the_host(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))
    measured = lambda plan: measure_entry(
        Entry(function="tests.memory.steps:gradients", arguments={"plan": plan}), "v5e-1"
    )
    kept, moved = measured("binomial:8"), measured("binomial:8+offload:carry")
    carry = 4 * 4096 * 2048
    assert (kept.host_bytes, moved.host_bytes) == (0, 9 * carry)
    assert moved.peak_bytes < kept.peak_bytes - 7.5 * carry
