"""Any plan over any depth: gradients of `none`, and the evaluations that its schedules promise."""

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxckpt.plans import Plan
from jaxckpt.schedules.of_stage import stack_schedule_of
from tests.transforms import cases

POLICIES = ("", "+dots", "+dots_no_batch", "+names:hidden", "+offload:hidden")
CARRIES = ("", "", "+offload:carry")
TOLERANCE = 0.0 if jax.__version__.startswith("0.10.") else 1e-6


@st.composite
def stages(draw, num_blocks: int) -> str:
    """Returns a stage that fits `num_blocks`, with or without policies."""
    number = draw(st.integers(1, num_blocks))
    schedule = draw(
        st.sampled_from(
            (
                "none",
                "full",
                f"uniform:{number}",
                f"every:{number}",
                "sqrt",
                "log",
                f"binomial:{number}",
            )
        )
    )
    if schedule.startswith(("full", "uniform", "every")):
        return schedule + draw(st.sampled_from((*POLICIES, "+offload:carry")))
    return schedule if schedule == "none" else schedule + draw(st.sampled_from(CARRIES))


@st.composite
def plans(draw, most_blocks: int = 24) -> tuple[int, str]:
    """Returns L and a plan of one to three stages that covers L blocks."""
    counts = draw(st.lists(st.integers(1, most_blocks // 3), min_size=1, max_size=3))
    parts = [draw(stages(count)) for count in counts]
    counted = [f"{n}x{stage}" for n, stage in zip(counts, parts, strict=True)]
    return sum(counts), "/".join([*counted[:-1], parts[-1]])


def promised(num_blocks: int, plan: str) -> int:
    """Returns how many blocks a gradient runs forward, by the counting rule."""
    total = 0
    for stage in Plan.parse(plan).bind(num_blocks).stages:
        if stage.schedule == "none":
            total += stage.count
        elif stage.schedule == "full":
            total += 2 * stage.count
        else:
            total += stage.count + stack_schedule_of(stage).extra_forwards
    return total


@pytest.mark.slow
@settings(max_examples=10, derandomize=True)
@given(plans())
def test_gradients_with_dropout_equal_none(case):
    num_blocks, plan = case
    loss, (params, carry, scale) = cases.run(num_blocks, plan)
    want, (want_params, want_carry, want_scale) = cases.run(num_blocks, "none")
    exact = cases.relative_error((loss, params, carry), (want, want_params, want_carry))
    assert exact <= TOLERANCE
    assert cases.relative_error(scale, want_scale) <= 1e-6


@pytest.mark.slow
@settings(max_examples=20, derandomize=True)
@given(plans())
def test_blocks_run_as_often_as_the_schedules_say(case):
    num_blocks, plan = case
    without_policies = "/".join(stage.partition("+")[0] for stage in plan.split("/"))
    counter = cases.count_evaluations(num_blocks, without_policies)
    assert counter.total == promised(num_blocks, without_policies), counter.counts
    assert set(counter.counts) == set(range(num_blocks))
