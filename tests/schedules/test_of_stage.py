"""Which schedule a stage means."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxckpt import schedules
from jaxckpt.plans import Plan
from jaxckpt.schedules import binomial, uniform
from jaxckpt.schedules.actions import Store
from jaxckpt.schedules.of_stage import log_slots, schedule_of, stack_schedule_of, under_loss
from jaxckpt.schedules.segments import two_level


def schedule(text: str, num_blocks: int):
    return schedule_of(Plan.parse(text).bind(num_blocks).stages[0])


def test_stages_without_a_schedule():
    assert schedule("none", 5) is None
    assert schedule("dots", 5) is None


def test_open_stage_is_refused():
    with pytest.raises(ValueError, match="not bound"):
        schedule_of(Plan.parse("sqrt").stages[0])


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7, 12, 28, 64, 100])
def test_words_and_schedules(num_blocks):
    slots = math.ceil(math.log2(num_blocks)) + 1
    assert log_slots(num_blocks) == slots
    assert schedule("log", num_blocks) == schedules.binomial(num_blocks, slots=slots)
    assert schedule("binomial:1", num_blocks) == schedules.binomial(num_blocks, slots=1)
    assert schedule("uniform:1", num_blocks).extra_forwards == 0
    assert schedule("every:1", num_blocks) == schedules.uniform(num_blocks, num_blocks)
    size = min(5, num_blocks)
    expected = schedules.uniform(num_blocks, math.ceil(num_blocks / size))
    assert schedule(f"every:{size}", num_blocks) == expected


@given(st.integers(1, 300))
def test_log_never_recomputes_more_than_textbook_halving(num_blocks):
    log = schedule("log", num_blocks)
    assert log.extra_forwards <= schedules.recursive(num_blocks).extra_forwards
    assert log.peak_slots <= log_slots(num_blocks)


@given(st.integers(1, 200), st.data())
def test_two_level_counts(num_blocks, data):
    segments = data.draw(st.integers(1, num_blocks))
    made = two_level(num_blocks, segments)
    sizes = schedules.segment_sizes(num_blocks, segments)
    assert made.extra_forwards == 2 * num_blocks - segments - sizes[-1]
    assert made.peak_slots <= (segments - 1) + (max(sizes) - 1)
    assert schedules.simulate(made).peak_residual_blocks == 1


@given(st.integers(1, 400))
def test_sqrt_keeps_about_two_roots_of_carries(num_blocks):
    assert schedule("sqrt", num_blocks).peak_slots <= 2 * math.sqrt(num_blocks)


@given(st.integers(1, 40), st.data())
def test_under_a_loss_the_last_block_runs_once_more(num_blocks, data):
    slots = data.draw(st.integers(1, num_blocks))
    schedule = binomial(num_blocks, slots)
    ran = under_loss(schedule)
    assert ran.extra_forwards == schedule.extra_forwards + 1  # replayed: the schedule is legal
    assert ran.counts.evaluations[-1] == 2
    # A slot that is free is used, so that there is one more carry at most.
    assert schedule.peak_slots <= ran.peak_slots <= schedule.peak_slots + 1
    used = {action.slot for action in ran.actions if isinstance(action, Store)}
    assert len(used) <= max(slots, schedule.peak_slots) + 1
    assert under_loss(ran) == ran


@pytest.mark.parametrize("text", ["uniform:3", "every:2", "uniform:8"])
def test_a_segment_that_is_kept_runs_as_it_is(text):
    stage = Plan.parse(text).bind(8).stages[0]
    assert stack_schedule_of(stage) == schedule_of(stage)
    assert under_loss(uniform(8, 3, keep_last=False)) == uniform(8, 3, keep_last=False)
