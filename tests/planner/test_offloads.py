"""Moving values to the host: the program against brute force, and plans that the planner makes."""

import dataclasses
import itertools
import math

import pytest

import jaxckpt
from jaxckpt.memory.roofline import Rates
from jaxckpt.memory.targets import LOCAL
from jaxckpt.planner import fit as fit_module
from jaxckpt.planner.costs import kind_cost, overlapped
from jaxckpt.planner.frontier import Graph
from jaxckpt.planner.kinds import find_kinds
from jaxckpt.planner.offload_check import Verdict
from jaxckpt.planner.offloads import Passes, proposals
from jaxckpt.planner.result import FitResult
from jaxckpt.planner.steps import Steps
from jaxckpt.plans import Plan, words
from tests.experiments.test_fit import report
from tests.planner import steps
from tests.planner.test_frontier import graph, seconds_of


def few_units() -> Graph:
    """A block with what its author has named, and its kernel: few enough for brute force."""
    found = graph()
    named = lambda unit: not any(map(words.is_invented, unit.policy.names))
    return dataclasses.replace(found, units=tuple(filter(named, found.units)))


FORWARD, BACKWARD, CARRY = 4e-6, 8e-6, 2048.0


def passes(link: float) -> Passes:
    return Passes(
        forward_seconds=FORWARD,
        backward_seconds=BACKWARD,
        carry_bytes=CARRY,
        link_bytes_per_second=link,
    )


def every_choice(found: Graph, link: float):
    """Yields `(device bytes, host bytes, seconds)` of every way to keep, move or make again."""
    may_move = [unit.policy.kind == "names" for unit in found.units]
    sizes = [unit.nbytes for unit in found.units]
    ways = [("again", "kept", "moved")[: 2 + move] for move in may_move]
    for *chosen, carry in itertools.product(*ways, ("kept", "moved")):
        kept = sum(s for s, c in zip(sizes, chosen, strict=True) if c == "kept")
        moved = sum(s for s, c in zip(sizes, chosen, strict=True) if c == "moved")
        again = seconds_of(found, tuple(c != "again" for c in chosen))
        kept, moved = kept + CARRY * (carry == "kept"), moved + CARRY * (carry == "moved")
        seconds = max(FORWARD, moved / link) + max(BACKWARD + again, moved / link)
        yield kept, moved, seconds


def figures(found: Graph, policies, link: float) -> tuple[float, float, float]:
    """Returns the same of proposed policies."""
    moved_names = {name for p in policies if p.kind == "offload" for name in p.names}
    is_moved = [bool(moved_names.intersection(unit.policy.names)) for unit in found.units]
    is_kept = [unit.policy in policies for unit in found.units]
    size = lambda chosen: sum(u.nbytes for u, c in zip(found.units, chosen, strict=True) if c)
    again = seconds_of(found, tuple(map(max, is_kept, is_moved)))
    kept = size(is_kept) + CARRY * ("carry" not in moved_names)
    moved = size(is_moved) + CARRY * ("carry" in moved_names)
    return kept, moved, max(FORWARD, moved / link) + max(BACKWARD + again, moved / link)


@pytest.mark.parametrize("link", [1e9, 3e8, 1e7])
@pytest.mark.parametrize("most", [math.inf, 4500.0])
def test_proposals_are_optimal(link, most):
    found = few_units()
    every = [choice for choice in every_choice(found, link) if choice[1] <= most]
    proposed = list(proposals(found, passes(link), most))
    assert proposed or link < 1e9, "a link that is slow enough is not worth its use"
    for policies in proposed:
        kept, moved, seconds = figures(found, policies, link)
        assert 0 < moved <= most
        best = min(s for size, _, s in every if size <= kept)
        assert seconds == pytest.approx(best, rel=1e-4)


def test_an_input_that_can_neither_stay_nor_go():
    found = few_units()
    proposed = list(proposals(found, passes(1e9), 100.0))
    assert all(figures(found, p, 1e9)[0] >= CARRY for p in proposed)


def test_a_pass_takes_the_longer_of_work_and_link():
    rates = Rates(flops_per_second=1.0, bytes_per_second=1.0, host_bytes_per_second=10.0)
    assert overlapped(2.0, 5.0, 10.0, rates) == 2.0 + 5.0
    assert overlapped(2.0, 5.0, 30.0, rates) == 3.0 + 5.0
    assert overlapped(2.0, 5.0, 80.0, rates) == 8.0 + 8.0


@pytest.fixture(scope="module")
def stack():
    _, finder = Steps(steps.step_for, LOCAL).trace(Plan.parse("full"))
    return finder.stacks


CHIP = Rates(flops_per_second=1e11, bytes_per_second=1e10, host_bytes_per_second=1e10)


def test_a_kind_says_what_is_where(stack):
    carry, hidden = steps.ROWS * steps.WIDTH * 4, steps.ROWS * 2 * steps.WIDTH * 4
    none, full, moved = (
        kind_cost(stack, Plan.parse(plan).stages[0], CHIP)
        for plan in ("none", "full", "full+offload:carry,hidden")
    )
    assert (none.host_bytes, full.host_bytes, moved.host_bytes) == (0, 0, carry + hidden)
    assert moved.kept_bytes == pytest.approx(full.kept_bytes - carry)
    assert moved.flops < full.flops, "hidden is not made again"
    slow = Rates(flops_per_second=1e11, bytes_per_second=1e10, host_bytes_per_second=1e6)
    on_slow = kind_cost(stack, moved.stage(), slow)
    assert on_slow.seconds == pytest.approx(2 * (carry + hidden) / 1e6)


def test_kinds_move_nothing_unless_they_may(stack):
    kinds, _ = find_kinds(stack, CHIP)
    assert not any(kind.host_bytes for kind in kinds)
    kinds, _ = find_kinds(stack, CHIP, host_bytes=2**30)
    moving = [kind for kind in kinds if kind.host_bytes]
    assert moving and all("offload" in str(kind) for kind in moving)


@pytest.fixture
def chip(monkeypatch):
    """The planner takes this process's CPU for a chip with memory of its own, and a fast link."""
    monkeypatch.setattr(fit_module, "rates_of", lambda target: CHIP)
    found = Verdict(allowed=True, text="gradients checked on a chip")
    monkeypatch.setattr(fit_module, "verdict", lambda target, knows_link: found)
    return found


def fitted(host_budget: int, budget: int = 2**30) -> FitResult:
    """Returns the answer for peaks of a compiler that likes every mix."""
    peaks = {"full": 0.5, "none": 3.0}
    of = Steps(steps.step_for, LOCAL, lambda plan: report(peaks.get(str(plan), 1.0)))
    asked = {"target": LOCAL, "budget": budget, "host_budget": host_budget}
    return fit_module.solve(of, steps.NUM_BLOCKS, **asked)


def test_plans_that_move_are_within_the_hosts_budget(chip):
    found = fitted(200 * 2**10)
    moving = [one for one in found.table if one.host_bytes]
    assert moving and all(one.host_bytes <= 200 * 2**10 for one in moving)
    assert "offload" in str(moving[0].plan)
    assert "0.0000 GiB compiled of 0.0002 GiB" in found.summary
    assert f"  offload    {chip.text}" in found.summary
    assert FitResult.from_json(found.as_json()) == found


def test_what_is_refused_is_not_planned(chip, monkeypatch):
    refused = Verdict(allowed=False, text="refused on a chip: wrong")
    monkeypatch.setattr(fit_module, "verdict", lambda target, knows_link: refused)
    found = fitted(2**30)
    assert not any(one.host_bytes for one in found.table)
    assert "  offload    refused on a chip: wrong" in str(found)
    with pytest.raises(jaxckpt.BudgetError, match=r"; offload: refused on a chip: wrong$"):
        fitted(2**30, budget=1000)


@pytest.mark.parametrize("given", ["12XB", -1, "0.1B"])
def test_bad_host_budgets(given):
    with pytest.raises(ValueError, match=r"^host_budget: ") as caught:
        jaxckpt.fit(steps.step_for, num_blocks=6, budget="1MiB", host_budget=given)
    assert "\n" not in str(caught.value)
