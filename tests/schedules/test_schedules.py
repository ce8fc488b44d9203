"""Schedules: counts, optimality, the order of re-runs, values, errors."""

import heapq
import itertools
import json
import math
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxckpt import schedules
from jaxckpt.schedules import Advance, Free, Load, Record, Reverse, Schedule, Store
from tests.schedules.schedule_cases import blocks_and_slots, parse
from tests.work import calls_of

GROUNDTRUTH = json.loads((pathlib.Path(__file__).parent / "groundtruth.json").read_text())
REVOLVE = [
    (int(num_blocks), int(slots), count)
    for num_blocks, by_slots in GROUNDTRUTH["revolve_extra_forwards"].items()
    for slots, count in by_slots.items()
]


# --- counts


def test_binomial_counts_are_revolves():
    for num_blocks, slots, count in REVOLVE:
        schedule = schedules.binomial(num_blocks, slots=slots)
        assert schedule.extra_forwards == count, (num_blocks, slots)
        assert schedule.peak_slots == slots
        assert schedule.counts.peak_residual_blocks == 1


@given(blocks_and_slots)
def test_binomial_is_legal_and_meets_the_closed_form(case):
    num_blocks, slots = case
    schedule = schedules.binomial(num_blocks, slots)
    counts = schedules.simulate(schedule)
    # Griewank and Walther 2000, proposition 1: p = t L - C(s+t, s+1), t least with C(s+t, s) >= L.
    t = next(t for t in range(num_blocks) if math.comb(slots + t, slots) >= num_blocks)
    assert counts.extra_forwards == t * num_blocks - math.comb(slots + t, slots + 1)
    assert counts.extra_forwards == schedules.binomial_extra_forwards(num_blocks, slots)
    assert sum(counts.evaluations) == num_blocks + counts.extra_forwards
    assert max(counts.evaluations) == t + 1  # no block is run forward more than t times more
    assert counts.peak_slots == min(slots, num_blocks - 1)


@given(st.integers(2, 90))
def test_one_more_slot_never_costs_more(num_blocks):
    counts = [schedules.binomial_extra_forwards(num_blocks, s) for s in range(1, num_blocks + 1)]
    assert counts[:-1] == sorted(set(counts), reverse=True)  # strictly less, up to L - 1 slots
    assert counts[-2:] == [num_blocks - 1] * 2 or num_blocks == 2


@given(st.integers(1, 300))
def test_recursive_never_beats_binomial_with_as_many_slots(num_blocks):
    counts = schedules.recursive(num_blocks).counts
    assert counts.peak_residual_blocks == 1
    assert counts.peak_slots == (num_blocks - 1).bit_length()
    slots = max(1, counts.peak_slots)
    assert counts.extra_forwards >= schedules.binomial_extra_forwards(num_blocks, slots)


@pytest.mark.parametrize("log", range(11))
def test_recursive_on_powers_of_two(log):
    schedule = schedules.recursive(2**log)
    assert schedule.extra_forwards == 2**log * log // 2
    assert schedule.peak_slots == log


@given(blocks_and_slots)
def test_uniform_runs_every_block_but_the_kept_ones_once_more(case):
    num_blocks, segments = case
    sizes = schedules.segment_sizes(num_blocks, segments)
    assert sum(sizes) == num_blocks and len(sizes) == segments
    assert list(sizes) == sorted(sizes) and sizes[-1] - sizes[0] <= 1
    kept = schedules.uniform(num_blocks, segments).counts
    assert kept.evaluations == (2,) * (num_blocks - sizes[-1]) + (1,) * sizes[-1]
    assert (kept.peak_slots, kept.peak_residual_blocks) == (segments - 1, sizes[-1])
    dropped = schedules.uniform(num_blocks, segments, keep_last=False).counts
    assert dropped.evaluations == (2,) * num_blocks
    assert (dropped.peak_slots, dropped.peak_residual_blocks) == (segments, sizes[-1])


def test_uniform_on_a_prime_number_of_blocks():
    assert schedules.segment_sizes(13, 4) == (3, 3, 3, 4)
    assert schedules.uniform(13, 4).extra_forwards == 9
    assert schedules.uniform(13, 13).extra_forwards == 12
    assert schedules.uniform(13, 1).actions[0] == Record(0, 13)


# --- optimality, by search over everything the machine can do


def fewest_extra_forwards(num_blocks, slots):
    """Shortest path over all legal action sequences that hold one block's residuals at a time."""
    start = (0, frozenset(), None, num_blocks - 1)
    best, order = {start: 0}, itertools.count()
    queue = [(0, next(order), start)]
    while queue:
        cost, _, state = heapq.heappop(queue)
        current, stored, recorded, last = state
        if last < 0:
            return cost
        moves = [(0, (carry, stored, recorded, last)) for carry in stored]  # Load
        moves += [(0, (current, stored - {carry}, recorded, last)) for carry in stored]  # Free
        if len(stored) < slots:
            moves.append((0, (current, stored | {current}, recorded, last)))  # Store
        if current < num_blocks:
            moves.append((1, (current + 1, stored, recorded, last)))  # Advance
        if recorded is None and current == last:
            moves.append((0, (current + 1, stored, last, last)))  # Record, one of the L
        if recorded == last:
            moves.append((0, (current, stored, None, last - 1)))  # Reverse
        for step, state in moves:
            if cost + step < best.get(state, math.inf):
                best[state] = cost + step
                heapq.heappush(queue, (cost + step, next(order), state))
    raise AssertionError("no schedule at all")


@pytest.mark.parametrize("num_blocks", range(1, 7))
def test_binomial_is_the_best_there_is(num_blocks):
    for slots in range(1, num_blocks + 1):
        best = fewest_extra_forwards(num_blocks, slots)
        assert schedules.binomial(num_blocks, slots).extra_forwards == best, slots


# --- order


def test_order_of_reruns_with_10_blocks_and_3_slots():
    """Griewank and Walther 2000, their example: 10 = C(3 + 2, 3), so the optimum is unique.

    The splits are C(4, 3) = 4 | 6; 6 = C(4, 2) into 3 | 3; 3 = C(3, 1) one by one.
    """
    expected = parse(
        "S0 A0-4 S1 A4-7 S2 A7-9 R9-10 B9 L2 A7-8 R8-9 B8 L2 F2 R7-8 B7 "
        "L1 A4-5 S2 A5-6 R6-7 B6 L2 F2 R5-6 B5 L1 F1 R4-5 B4 "
        "L0 A0-1 S1 A1-2 S2 A2-3 R3-4 B3 L2 F2 R2-3 B2 L1 F1 R1-2 B1 L0 F0 R0-1 B0"
    )
    assert schedules.binomial(10, slots=3).actions == expected


def test_order_of_recursive_halving():
    expected = parse("S0 A0-2 S1 A2-3 R3-4 B3 L1 F1 R2-3 B2 L0 A0-1 R1-2 B1 L0 F0 R0-1 B0")
    assert schedules.recursive(4).actions == expected


def test_order_of_uniform_segments():
    kept = parse("S0 A0-2 R2-5 B4 B3 B2 L0 F0 R0-2 B1 B0")
    assert schedules.uniform(5, 2).actions == kept
    dropped = parse("S0 A0-2 S1 A2-5 L1 F1 R2-5 B4 B3 B2 L0 F0 R0-2 B1 B0")
    assert schedules.uniform(5, 2, keep_last=False).actions == dropped


@given(blocks_and_slots)
def test_what_an_executor_relies_on(case):
    schedule = schedules.binomial(*case)
    pairs = list(zip(schedule.actions, schedule.actions[1:], strict=False))
    for action, following in pairs:
        if isinstance(action, Record):
            assert following == Reverse(action.start) and action.stop == action.start + 1
        if isinstance(following, Free):  # as early as can be: right behind the slot's last load
            assert action == Load(following.slot)
    first_sweep = schedule.actions[: schedule.actions.index(Reverse(case[0] - 1))]
    stores = [action.slot for action in first_sweep if isinstance(action, Store)]
    assert stores == list(range(schedule.peak_slots))
    assert not any(isinstance(action, Load | Free) for action in first_sweep)


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_binomial_stores_no_more_carries_than_an_optimal_schedule_has_to(slots):
    known = {}

    def fewest_stores(num_blocks, slots):  # beside the store of the run's own input
        if num_blocks == 1:
            return 0
        if (num_blocks, slots) not in known:
            best = schedules.binomial_extra_forwards(num_blocks, min(slots, num_blocks))
            known[num_blocks, slots] = min(
                fewest_stores(left, slots) + fewest_stores(right, slots - 1) + (right > 1)
                for left, right in ((n, num_blocks - n) for n in range(1, num_blocks))
                if (slots > 1 or right == 1)
                and left + cost(left, slots) + cost(right, slots - 1) == best
            )
        return known[num_blocks, slots]

    def cost(num_blocks, slots):
        if num_blocks == 1:
            return 0
        return schedules.binomial_extra_forwards(num_blocks, min(slots, num_blocks))

    for num_blocks in range(slots, 60):
        stores = schedules.binomial(num_blocks, slots).counts.stores
        assert stores == fewest_stores(num_blocks, slots) + (num_blocks > 1)


def test_a_thousand_blocks_are_no_work():
    assert schedules.binomial(1000, 12).extra_forwards == 4 * 1000 - math.comb(16, 13)
    assert schedules.binomial(1000, 1).extra_forwards == 1000 * 999 // 2
    assert len(schedules.binomial(1000, 1).actions) <= 4 * 1000
    assert schedules.recursive(1000).peak_slots == 10
    of = lambda blocks: calls_of(lambda: schedules.binomial(blocks, 12).extra_forwards)[1]
    assert of(1000) < 2.5 * of(500) < 500_000, "it grows with the blocks, not with their square"


# --- values and errors


def test_schedules_are_values():
    first, second = schedules.binomial(8, 3), schedules.binomial(8, slots=3)
    assert first == second and hash(first) == hash(second) and len({first, second}) == 1
    assert first != schedules.binomial(8, 4)
    assert str(first) == "binomial(slots=3): 8 blocks, 11 extra forwards, 3 slots"
    assert str(schedules.binomial(1, 1)) == "binomial(slots=1): 1 block, 0 extra forwards, 0 slots"
    assert first.peak_bytes is first.extra_forward_cost is first.total_cost is None
    assert Store(slot=1) == Store(1) != Load(1)
    with pytest.raises(AttributeError):
        first.actions = ()
    with pytest.raises((AttributeError, TypeError)):
        Store(1).slot = 2


@pytest.mark.parametrize(
    "call, error, said",
    [
        (lambda: schedules.binomial(0, 1), ValueError, "num_blocks is 0; valid is at least 1"),
        (lambda: schedules.binomial(8, 0), ValueError, "slots is 0; valid is from 1 to 8"),
        (lambda: schedules.binomial(8, 9), ValueError, "slots is 9; valid is from 1 to 8"),
        (lambda: schedules.binomial(8, -1), ValueError, "slots is -1; valid is from 1 to 8"),
        (lambda: schedules.binomial(8, True), TypeError, "slots is True; an integer is needed"),
        (lambda: schedules.binomial(8.0, 2), TypeError, "num_blocks is 8.0; an integer is needed"),
        (lambda: schedules.binomial_extra_forwards(8, 9), ValueError, "slots is 9; valid is from"),
        (lambda: schedules.uniform(8, 9), ValueError, "segments is 9; valid is from 1 to 8"),
        (lambda: schedules.uniform(8, "2"), TypeError, "segments is '2'; an integer is needed"),
        (lambda: schedules.recursive(0), ValueError, "num_blocks is 0; valid is at least 1"),
        (lambda: Schedule(0, ()), ValueError, "num_blocks is 0; valid is at least 1"),
        (lambda: Schedule(1, ("S0",)), TypeError, "action 0 is 'S0'; a schedule is made of"),
        (lambda: Store(-1), ValueError, "slot is -1; valid is at least 0"),
        (lambda: Advance(2, 2), ValueError, "stop is 2; valid is at least 3"),
        (lambda: Record(start=-1, stop=2), ValueError, "start is -1; valid is at least 0"),
        (lambda: Reverse(True), TypeError, "block is True; an integer is needed"),
    ],
)
def test_errors_are_one_line_with_what_was_given_and_what_is_valid(call, error, said):
    with pytest.raises(error) as caught:
        call()
    assert said in str(caught.value) and "\n" not in str(caught.value)
