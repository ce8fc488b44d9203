"""The simulator of schedules: legality held against the machine's rules, counts, bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxckpt import schedules
from jaxckpt.schedules import Advance, Free, Load, Record, Reverse, Schedule, Store
from tests.schedules.schedule_cases import all_schedules, parse


def is_legal(num_blocks, actions):
    """The rules of the machine in the fewest words, to hold the simulator against."""
    current, slots, recorded, left = 0, {}, set(), list(range(num_blocks))
    for action in actions:
        match action:
            case Store(slot) if slot not in slots:
                slots[slot] = current
            case Load(slot) if slot in slots:
                current = slots[slot]
            case Free(slot) if slot in slots:
                del slots[slot]
            case Advance(start, stop) if start == current and stop <= num_blocks:
                current = stop
            case Record(start, stop) if (
                start == current and set(range(start, stop)) <= set(left) - recorded
            ):
                recorded |= set(range(start, stop))
                current = stop
            case Reverse(block) if left[-1:] == [block] and block in recorded:
                recorded.remove(left.pop())
            case _:
                return False
    return not left and not slots


@settings(max_examples=300)
@given(st.data())
def test_simulator_refuses_mutants_and_nothing_else(data):
    num_blocks = data.draw(st.integers(1, 12))
    candidates = all_schedules(num_blocks, data.draw(st.integers(1, num_blocks)))
    actions = list(data.draw(st.sampled_from(candidates)).actions)
    assert is_legal(num_blocks, actions)
    at = data.draw(st.integers(0, len(actions) - 1))
    match data.draw(st.sampled_from(["drop", "duplicate", "swap", "move"])):
        case "drop":
            del actions[at]
        case "duplicate":
            actions.insert(at, actions[at])
        case "swap":
            actions[at - 1], actions[at] = actions[at], actions[at - 1]
        case "move":
            actions.insert(data.draw(st.integers(0, len(actions) - 1)), actions.pop(at))
    if is_legal(num_blocks, actions):
        schedules.simulate(Schedule(num_blocks, tuple(actions)))
    else:
        with pytest.raises(schedules.IllegalSchedule, match=r"^(action \d+, |end, ).*; state: "):
            schedules.simulate(Schedule(num_blocks, tuple(actions)))


@pytest.mark.parametrize("schedule", all_schedules(9, 3), ids=str)
def test_no_action_can_be_left_out(schedule):
    legal = []
    for at, action in enumerate(schedule.actions):
        rest = schedule.actions[:at] + schedule.actions[at + 1 :]
        try:
            schedules.simulate(Schedule(9, rest))
            legal.append(action)
        except schedules.IllegalSchedule:
            pass
    # With no segment kept the first sweep ends at the stack's output, which only the loss reads.
    drops_last = "keep_last=False" in schedule.name
    assert legal == ([Advance(6, 9)] if drops_last else [])


@pytest.mark.parametrize(
    "text, said",
    [
        ("A1-2", "action 0, Advance(start=1, stop=2): it starts from carry 1, but the current"),
        ("A0-3", "action 0, Advance(start=0, stop=3): the last block is 1"),
        ("S0 A0-1 S0", "action 2, Store(slot=0): slot 0 already holds carry 0"),
        ("L1", "action 0, Load(slot=1): slot 1 is empty"),
        ("F0", "action 0, Free(slot=0): slot 0 is empty"),
        ("S0 R0-1 L0 R0-1", "action 3, Record(start=0, stop=1): block 0 is already recorded"),
        ("S0 R0-2 B1 L0 A0-1 R1-2", "block 1 is already reversed"),
        ("R0-1 B0", "action 1, Reverse(block=0): blocks are reversed from the last to the first"),
        ("A0-1 A1-2 B1", "action 2, Reverse(block=1): block 1 is not recorded"),
        ("R0-2 B1", "end, after 2 actions: blocks are left to reverse; state: current carry 2, "),
        ("S7 R0-2 B1 B0", "end, after 4 actions: slots are in use; state: current carry 2, "),
        ("S0 S3 R0-1 L1", "state: current carry 1, slots {0: 0, 3: 0}, recorded [0], next to re"),
    ],
)
def test_an_illegal_schedule_says_which_action_what_and_the_state(text, said):
    with pytest.raises(schedules.IllegalSchedule) as caught:
        schedules.simulate(Schedule(2, parse(text)))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_counts_of_a_schedule_written_by_hand():
    counts = Schedule(3, parse("S0 A0-1 S5 A1-2 R2-3 B2 L5 F5 R1-2 B1 L0 F0 R0-1 B0")).counts
    assert counts == schedules.Counts(
        advanced=2, recorded=3, extra_forwards=2, peak_slots=2, peak_residual_blocks=1,
        evaluations=(2, 2, 1), loads=2, stores=2, extra_forward_cost=None, peak_bytes=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "probe, peak",
    [
        ("", 300 + 100),  # three copies of the output, and its gradient
        ("L0 A0-1", 300 + 100 + 50),  # the chain's input is free, the block's output is not
        ("L0 A0-1 A1-2", 300 + 100 + 50 + 40),  # a carry that no slot holds is the next's input
        ("L0 A0-2", 300 + 100 + 50 + 40),
        ("L0 A0-1 S4 A1-2 F4", 300 + 100 + 50 + 40),  # or a slot holds it, once
        ("L0 A0-1 S4 S5 F4 F5", 300 + 100 + 50 + 50),  # two slots are two copies
    ],
)
def test_bytes_of_a_schedule_written_by_hand(probe, peak):
    before, after = "S0 A0-3 S1 S2 S3", "F1 F2 F3 L0 A0-2 R2-3 B2 L0 A0-1 R1-2 B1 L0 F0 R0-1 B0"
    costs = schedules.ChainCosts(
        forward=[1, 1, 1],
        backward=[2, 2, 2],
        carry_bytes=[9999, 50, 40, 100],
        residual_bytes=[50, 40, 100],
    )
    schedule = Schedule(3, parse(f"{before} {probe} {after}"))
    assert schedules.simulate(schedule, costs=costs).peak_bytes == peak


def test_the_input_of_a_recorded_block_is_held_once():
    costs = schedules.ChainCosts(
        forward=[1, 3], backward=[2, 2], carry_bytes=[0, 50, 40], residual_bytes=[50, 45]
    )
    schedule = Schedule(2, parse("S0 A0-1 S1 R1-2 L1 F1 A1-2 B1 L0 F0 R0-1 B0"), costs=costs)
    assert schedule.peak_bytes == 45 + 50 + 40 + 40  # residuals, input, a new output, a gradient
    assert schedule.extra_forward_cost == 1 + 3


def test_a_slot_weighs_nothing_while_its_carry_is_among_recorded_residuals():
    costs = schedules.ChainCosts(
        forward=[1, 3], backward=[2, 2], carry_bytes=[0, 50, 40], residual_bytes=[50, 45]
    )
    schedule = Schedule(2, parse("S0 A0-1 R1-2 S1 B1 L0 F0 R0-1 B0 F1"), costs=costs)
    assert schedule.peak_bytes == 40 + 50 + 50  # the slot again, residuals, a gradient
