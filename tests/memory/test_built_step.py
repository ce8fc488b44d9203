"""What goes with a step: recomputed FLOPs, time, findings; and what its stack keeps."""

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.costs.roofline import Rates
from jaxckpt.memory.built_step import BuiltStep, annotate, stack_bytes
from jaxckpt.memory.measure import compile_step
from jaxckpt.plans import as_plan

LENGTH, WIDTH, ROWS = 8, 64, 32
CARRY = 4 * ROWS * WIDTH
W = jax.ShapeDtypeStruct((LENGTH, WIDTH, WIDTH), jnp.float32)
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
RATES = Rates(flops_per_second=1e12, bytes_per_second=1e11)


def block(x, w):
    return x + jnp.tanh(jaxckpt.tag(x @ w, "product"))


def built(name: str, /, **changes) -> BuiltStep:
    def gradient(plan):
        loss = lambda w, x: jaxckpt.scan_blocks(block, w, x, remat=plan).sum()
        return jax.grad(loss, argnums=(0, 1))

    parts = {
        "plan": as_plan(name).bind(LENGTH),
        "baseline": gradient("none"),
        "block": (block, W_I, X),
    }
    return BuiltStep(fn=gradient(name), args=(W, X), **(parts | changes))


W_I = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)


def test_recomputed_flops_are_those_of_the_schedule():
    product = 2 * ROWS * WIDTH * WIDTH
    again = lambda plan: compile_step(built(plan))[1].recomputed_flops / product
    assert again("none") == 0
    schedule = jaxckpt.schedules.binomial(LENGTH, slots=3)
    assert again("binomial:3") == schedule.extra_forwards + 1
    assert again("uniform:2") == LENGTH // 2


def test_time_is_the_rooflines_where_rates_are_known():
    _, report = compile_step(built("full"))
    step, jaxpr = built("full"), jax.make_jaxpr(built("full").fn)(W, X)
    timed = annotate(step, jaxpr, report, rates=RATES)
    assert timed.estimated_seconds > 0 and report.estimated_seconds is None
    again = type(timed).from_json(timed.as_json())
    assert again == timed


def test_findings_of_the_block_are_in_the_report():
    useless = lambda x, w: jaxckpt.tag(block(x, w), "out")
    parts = {"block": (useless, W_I, X), "plan": as_plan("names:out").bind(LENGTH)}
    _, report = compile_step(built("full", **parts))
    assert len(report.findings) == 1 and "tag-on-output" in report.findings[0]
    assert compile_step(built("names:product"))[1].findings == ()


@pytest.mark.parametrize(
    "plan, kept",
    [
        ("none", 8 * 3),  # x for the product, two values for the derivative of tanh
        ("full", 8),
        ("uniform:2", 1 + 3 * 3),
        ("binomial:3", 3 + 1),  # and what waits for the loss
        ("4xfull/none", 4 + 4 * 3),
        ("full+offload:carry", 0),
    ],
)
def test_what_a_stack_keeps(plan, kept):
    bound = as_plan(plan).bind(LENGTH)
    assert stack_bytes(bound, block, W_I, X) == pytest.approx((kept + 3) * CARRY)
