"""The optimal chain against published numbers, search over all schedules, and its own replay."""

import heapq
import itertools
import json
import math
import pathlib
import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxckpt import schedules
from jaxckpt.schedules import BudgetTooSmall, ChainCosts, Record, Reverse, optimal_chain
from tests.work import calls_of

GROUNDTRUTH = json.loads((pathlib.Path(__file__).parent / "groundtruth.json").read_text())
ROTOR = GROUNDTRUTH["rotor_homogeneous"]


def equal_blocks(num_blocks, residual, carry=1):
    return dict(
        forward=[1] * num_blocks,
        backward=[2] * num_blocks,
        carry_bytes=[carry] * (num_blocks + 1),
        residual_bytes=[residual] * num_blocks,
    )


def random_chain(seed, num_blocks, scale=1):
    rng = random.Random(seed)
    carry = [rng.randint(1, 6) * scale for _ in range(num_blocks + 1)]
    return dict(
        forward=[rng.uniform(0.5, 2.0) for _ in range(num_blocks)],
        backward=[1.0] * num_blocks,
        carry_bytes=carry,
        residual_bytes=[carry[i + 1] + rng.randint(0, 30) * scale for i in range(num_blocks)],
    )


def least_budget(chain):
    with pytest.raises(BudgetTooSmall) as caught:
        optimal_chain(**chain, budget=0)
    return caught.value.least_bytes


@st.composite
def chains(draw, max_blocks=4, max_size=6):
    num_blocks = draw(st.integers(1, max_blocks))

    def numbers(least, count=num_blocks):
        return draw(st.lists(st.integers(least, max_size), min_size=count, max_size=count))

    carry, beside = numbers(1, num_blocks + 1), numbers(0)
    residual = [carry[i + 1] + beside[i] for i in range(num_blocks)]
    forward = numbers(0)
    return dict(forward=forward, backward=forward, carry_bytes=carry, residual_bytes=residual)


# --- published numbers


@pytest.mark.parametrize("name", ROTOR)
def test_equal_blocks_meet_the_published_thresholds(name):
    num_blocks, residual = (int(word[1:]) for word in name.split("_"))
    chain = equal_blocks(num_blocks, residual)
    assert least_budget(chain) == ROTOR[name][0][0]
    thresholds = []
    for budget in range(ROTOR[name][0][0], ROTOR[name][-1][0] + 5):
        schedule = optimal_chain(**chain, budget=budget)
        assert schedule.unit_bytes == 1 and schedule.peak_bytes <= budget
        assert schedule.extra_forward_cost == schedule.extra_forwards
        if not thresholds or schedule.extra_forwards != thresholds[-1][1]:
            thresholds.append([budget, schedule.extra_forwards])
            # Less would not have done, so the replay must find the budget used up to the last byte.
            assert schedule.peak_bytes == budget
    assert thresholds == ROTOR[name]


@pytest.mark.parametrize("slots", range(1, 9))
def test_with_large_residuals_it_is_revolve(slots):
    """One block's residuals and `slots` carries, the chain's input free and the gradient not."""
    budget = (slots - 1) + 1 + 100 + 1  # kept carries, the live block's input, R, gradient
    schedule = optimal_chain(**equal_blocks(20, 100), budget=budget)
    assert schedule.extra_forwards == schedules.binomial_extra_forwards(20, slots)


def test_replay_of_known_schedules_gives_the_peaks_of_theory():
    """The usual formulas, with a = 1 and R = 17: carries kept, residuals, and one gradient."""
    costs = ChainCosts(**equal_blocks(16, 17))

    def peak(schedule):
        return schedules.simulate(schedule, costs=costs).peak_bytes

    assert peak(schedules.uniform(16, 1)) == 16 * 17 + 1  # nothing is run again
    assert peak(schedules.uniform(16, 16)) == (16 - 1) + 17 + 1  # every carry kept
    assert peak(schedules.uniform(16, 4)) == (4 - 1) + 4 * 17 + 1
    assert peak(schedules.binomial(16, 5)) == 5 + 17 + 1
    assert peak(schedules.recursive(16)) == 4 + 17 + 1


# --- optimality, by search


def cheapest(forward, carry_bytes, residual_bytes, budget, *, is_persistent=True, **_):
    """Shortest path over everything the machine can do within the budget; None if nothing fits."""
    num_blocks = len(forward)

    def held(current, slots, recorded, last):
        if last < 0:
            return 0
        kept = {k for k in slots | recorded | {current} if k > 0 and k - 1 not in recorded}
        residuals = sum(residual_bytes[block] for block in recorded)
        return residuals + sum(carry_bytes[k] for k in kept) + carry_bytes[last + 1]

    def moves(current, slots, recorded, last):
        for k in slots:
            yield 0, 0, (k, slots, recorded, last)  # Load
            if k in recorded or k > last or not is_persistent:
                yield 0, 0, (current, slots - {k}, recorded, last)  # Free
        if current >= 0:
            yield 0, 0, (current, slots | {current}, recorded, last)  # Store
            yield 0, 0, (-1, slots, recorded, last)  # the current carry is not needed any more
        if 0 <= current < num_blocks:
            output = carry_bytes[current + 1]
            yield forward[current], output, (current + 1, slots, recorded, last)  # Advance
        if 0 <= current <= last and current not in recorded:
            yield 0, 0, (current + 1, slots, recorded | {current}, last)  # Record
        if last in recorded:
            yield 0, 0, (current, slots, recorded - {last}, last - 1)  # Reverse

    start = (0, frozenset(), frozenset(), num_blocks - 1)
    best, order = {start: 0}, itertools.count()
    queue = [(0, next(order), start)]
    while queue:
        cost, _, state = heapq.heappop(queue)
        if state[-1] < 0:
            return cost
        for step, beside, after in moves(*state):
            fits = max(held(*state) + beside, held(*after)) <= budget
            if fits and cost + step < best.get(after, math.inf):
                best[after] = cost + step
                heapq.heappush(queue, (cost + step, next(order), after))
    return None


def cost_or_none(chain, budget):
    try:
        schedule = optimal_chain(**chain, budget=budget)
    except BudgetTooSmall as error:
        assert error.least_bytes > budget
        return None
    assert schedule.peak_bytes <= budget
    return schedule.extra_forward_cost


@pytest.mark.slow
@settings(max_examples=150)
@given(chains(max_blocks=5), st.integers(0, 24))
def test_no_persistent_schedule_is_cheaper(chain, beyond):
    least = least_budget(chain)
    assert cheapest(**chain, budget=least - 1) is None
    budget = least + beyond
    assert cost_or_none(chain, budget) == cheapest(**chain, budget=budget)


@pytest.mark.slow
@pytest.mark.parametrize(
    "least, forward, carry_bytes, residual_bytes",
    [
        # The block in the middle decides: input 6, residuals 8, gradient 5.
        (19, [3, 1, 4, 1, 5, 9], [9, 2, 6, 5, 3, 5, 2], [7, 9, 8, 9, 8, 6]),
        # The first sweep decides: two carries of 6 beside the gradient of the output, 9.
        (21, [1, 1, 1, 1], [1, 6, 6, 1, 9], [6, 6, 1, 9]),
        # Blocks alike but for their outputs, and runs alike but for their inputs.
        (15, [1, 1, 1, 1, 1], [2, 2, 2, 6, 1, 6], [7, 7, 7, 7, 7]),
    ],
)
def test_chains_made_for_one_term_of_the_recurrence(least, forward, carry_bytes, residual_bytes):
    chain = dict(forward=forward, backward=forward)
    chain |= dict(carry_bytes=carry_bytes, residual_bytes=residual_bytes)
    assert least_budget(chain) == least
    assert cheapest(**chain, budget=least - 1) is None
    for budget in range(least, least + 20, 2):
        assert cost_or_none(chain, budget) == cheapest(**chain, budget=budget)


def test_giving_a_carry_up_early_can_be_cheaper():
    """Beaumont et al. 2019: persistent schedules are not always the best; ours is one."""
    chain = dict(
        forward=[1, 1, 8, 0, 1],
        backward=[1] * 5,
        carry_bytes=[0, 1, 3, 2, 2, 1],
        residual_bytes=[2, 3, 2, 2, 1],
    )
    assert optimal_chain(**chain, budget=7).extra_forward_cost == 13
    assert cheapest(**chain, budget=7) == 13
    assert cheapest(**chain, budget=7, is_persistent=False) == 12


# --- properties


@given(chains(max_blocks=9, max_size=40), st.data())
def test_within_the_budget_and_never_worse_with_more(chain, data):
    least = least_budget(chain)
    assert optimal_chain(**chain, budget=least).peak_bytes == least
    budgets = data.draw(st.lists(st.integers(least, least + 200), min_size=2, max_size=6))
    costs = [cost_or_none(chain, budget) for budget in sorted(budgets)]
    assert costs == sorted(costs, reverse=True)
    # Planned again with just the bytes of its replay: the program and the simulator agree.
    schedule = optimal_chain(**chain, budget=budgets[0])
    assert cost_or_none(chain, schedule.peak_bytes) == schedule.extra_forward_cost


@given(chains(max_blocks=7), st.integers(0, 20), st.integers(2, 10**9))
def test_sizes_with_a_common_divisor_are_planned_exactly(chain, beyond, divisor):
    budget = least_budget(chain) + beyond
    small = optimal_chain(**chain, budget=budget)
    for name in ("carry_bytes", "residual_bytes"):
        chain[name] = [size * divisor for size in chain[name]]
    large = optimal_chain(**chain, budget=budget * divisor + divisor - 1)
    assert large.actions == small.actions and large.unit_bytes == 1
    assert large.peak_bytes == small.peak_bytes * divisor


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_large_sizes_are_rounded_and_the_budget_still_holds(fraction):
    chain = random_chain(seed=3, num_blocks=12, scale=1_000_003)
    chain["residual_bytes"][0] += 1  # no common divisor any more
    budget = int(fraction * sum(chain["residual_bytes"]))
    schedule = optimal_chain(**chain, budget=budget)
    assert 2000 * (schedule.unit_bytes - 1) < budget <= 2000 * schedule.unit_bytes
    assert schedule.peak_bytes <= budget
    # Rounding costs at most what a budget smaller by one unit a kept size would cost.
    exact = random_chain(seed=3, num_blocks=12)
    tighter = optimal_chain(**exact, budget=(budget - 30 * schedule.unit_bytes) // 1_000_003 - 1)
    assert schedule.extra_forward_cost <= tighter.extra_forward_cost


def test_the_least_budget_works_even_where_rounding_says_it_does_not():
    chain = equal_blocks(num_blocks=9, residual=3001)  # carries of 1 byte, units of 2
    schedule = optimal_chain(**chain, budget=3003)
    assert (schedule.unit_bytes, schedule.peak_bytes) == (2, 3003)


def test_more_than_enough_keeps_everything():
    chain = random_chain(seed=0, num_blocks=5, scale=2**30)
    schedule = optimal_chain(**chain, budget=2**60)
    assert schedule.actions == (Record(0, 5), *map(Reverse, (4, 3, 2, 1, 0)))
    assert (schedule.extra_forward_cost, schedule.unit_bytes, schedule.peak_slots) == (0, 1, 0)
    assert schedule.total_cost == pytest.approx(sum(chain["forward"]) + sum(chain["backward"]))


def test_dear_blocks_are_kept_and_cheap_ones_run_again():
    chain = equal_blocks(num_blocks=6, residual=10) | {"forward": [1, 50, 1, 1, 50, 1]}
    schedule = optimal_chain(**chain, budget=34)
    times = schedule.counts.evaluations
    assert (times[1], times[4]) == (1, 1) and schedule.extra_forwards > 0
    weighed = (f * (n - 1) for f, n in zip(chain["forward"], times, strict=True))
    assert schedule.extra_forward_cost == sum(weighed)


def test_the_input_and_its_size_do_not_matter():
    chain = random_chain(seed=5, num_blocks=8)
    budget = least_budget(chain) + 9
    first = optimal_chain(**chain, budget=budget)
    chain["carry_bytes"][0] = 10**6
    assert optimal_chain(**chain, budget=budget).actions == first.actions
    large = equal_blocks(num_blocks=4, residual=40 * 10**6, carry=10**6)
    large["carry_bytes"][0] = 7  # which would leave no common divisor
    assert optimal_chain(**large, budget=10**8).unit_bytes == 1


def test_64_blocks_and_500_units_are_little_work():
    chain = random_chain(seed=1, num_blocks=64)
    schedule, calls = calls_of(lambda: optimal_chain(**chain, budget=500))
    assert calls < 1_000_000  # 200,000; a table of Python's own would take 64**3 * 500 / 6
    assert schedule.unit_bytes == 1 and schedule.peak_bytes <= 500 and schedule.extra_forwards > 0


def test_equal_blocks_are_solved_once():
    schedule, calls = calls_of(lambda: optimal_chain(**equal_blocks(128, 17), budget=400))
    assert calls < 3_000_000  # 800,000
    assert schedule.peak_bytes <= 400


# --- errors


def test_too_small_a_budget_names_the_least():
    with pytest.raises(BudgetTooSmall) as caught:
        optimal_chain(**equal_blocks(8, 4096, carry=1024), budget=5000)
    assert isinstance(caught.value, ValueError)
    assert caught.value.least_bytes == 4096 + 2 * 1024
    assert str(caught.value) == "no schedule fits in 5,000 bytes; the least is 6,144 bytes"
    assert pickle.loads(pickle.dumps(caught.value)).least_bytes == 6144


@pytest.mark.parametrize(
    "change, error, said",
    [
        ({"forward": []}, ValueError, "forward is empty; a chain has at least 1 block"),
        ({"backward": [1]}, ValueError, "backward has 1 entries; a chain of 3 blocks"),
        ({"carry_bytes": [1, 1, 1]}, ValueError, "carry_bytes has 3 entries; a chain of 3 blocks "),
        ({"carry_bytes": [1, 1, 1]}, ValueError, "needs 4"),
        ({"residual_bytes": [4, 4]}, ValueError, "residual_bytes has 2 entries"),
        ({"forward": [1, -1, 1]}, ValueError, "forward[1] is -1; a cost is a finite number"),
        ({"backward": [1, math.nan, 1]}, ValueError, "backward[1] is nan; a cost is a finite"),
        ({"forward": [1, "2", 1]}, ValueError, "forward[1] is '2'; a cost is a finite number"),
        ({"carry_bytes": [1, 1.5, 1, 1]}, TypeError, "carry_bytes[1] is 1.5; an integer is needed"),
        ({"residual_bytes": [4, True, 4]}, TypeError, "residual_bytes[1] is True; an integer is"),
        ({"residual_bytes": [4, -4, 4]}, ValueError, "residual_bytes[1] is -4; valid is at least"),
        ({"residual_bytes": [4, 0, 4]}, ValueError, "residual_bytes[1] is 0, less than the block"),
        ({"budget": -1}, ValueError, "budget is -1; valid is at least 0"),
        ({"budget": 1e9}, TypeError, "budget is 1000000000.0; an integer is needed"),
    ],
)
def test_errors_are_one_line_with_what_was_given_and_what_is_valid(change, error, said):
    with pytest.raises(error) as caught:
        optimal_chain(**(equal_blocks(3, 4) | {"budget": 8} | change))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_costs_of_another_number_of_blocks():
    with pytest.raises(ValueError, match="costs are of 3 blocks, the schedule has 8"):
        schedules.simulate(schedules.binomial(8, 2), costs=ChainCosts(**equal_blocks(3, 4)))
