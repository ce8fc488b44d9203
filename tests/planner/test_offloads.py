"""Moving values to the host: the program against brute force, and plans that the planner makes."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.costs.roofline import Rates
from jaxckpt.planner import fit as fit_module
from jaxckpt.planner.inside_block import Graph, Passes, offload_proposals
from jaxckpt.planner.kinds import find_kinds, kind_cost, with_copies
from jaxckpt.planner.offload_check import Verdict
from jaxckpt.planner.result import FitResult
from jaxckpt.planner.steps import Steps
from jaxckpt.plans import Plan, words
from jaxckpt.schedules.of_stage import schedule_of
from jaxckpt.targets.links import HostLink
from jaxckpt.targets.target import LOCAL
from jaxckpt.transforms import stack_executor
from tests.experiments.test_fit import report
from tests.planner import steps
from tests.planner.steps import CHIP
from tests.planner.test_frontier import graph, seconds_of


def few_units() -> Graph:
    """A block with what its author has named, and its kernel: few enough for brute force."""
    found = graph()
    named = lambda unit: not any(map(words.is_invented, unit.policy.names))
    return dataclasses.replace(found, units=tuple(filter(named, found.units)))


FORWARD, BACKWARD, CARRY = 4e-6, 8e-6, 2048.0


def passes(link: HostLink) -> Passes:
    return Passes(
        forward_seconds=FORWARD,
        backward_seconds=BACKWARD,
        carry_bytes=CARRY,
        link=link,
    )


def every_choice(found: Graph, link: HostLink):
    """Yields `(device bytes, host bytes, seconds)` of every way to keep, move or make again."""
    may_move = [unit.policy.kind == "names" for unit in found.units]
    sizes = [unit.nbytes for unit in found.units]
    ways = [("again", "kept", "moved")[: 2 + move] for move in may_move]
    for *chosen, carry in itertools.product(*ways, ("kept", "moved")):
        kept = sum(s for s, c in zip(sizes, chosen, strict=True) if c == "kept")
        moved = sum(s for s, c in zip(sizes, chosen, strict=True) if c == "moved")
        again = seconds_of(found, tuple(c != "again" for c in chosen))
        kept, moved = kept + CARRY * (carry == "kept"), moved + CARRY * (carry == "moved")
        seconds = link.seconds(FORWARD, moved) + link.seconds(BACKWARD + again, moved)
        yield kept, moved, seconds


def figures(found: Graph, policies, link: HostLink) -> tuple[float, float, float]:
    """Returns the same of proposed policies."""
    moved_names = {name for p in policies if p.kind == "offload" for name in p.names}
    is_moved = [bool(moved_names.intersection(unit.policy.names)) for unit in found.units]
    is_kept = [unit.policy in policies for unit in found.units]
    size = lambda chosen: sum(u.nbytes for u, c in zip(found.units, chosen, strict=True) if c)
    again = seconds_of(found, tuple(map(max, is_kept, is_moved)))
    kept = size(is_kept) + CARRY * ("carry" not in moved_names)
    moved = size(is_moved) + CARRY * ("carry" in moved_names)
    return kept, moved, link.seconds(FORWARD, moved) + link.seconds(BACKWARD + again, moved)


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("rate", [1e9, 3e8, 1e7])
@pytest.mark.parametrize("most", [math.inf, 4500.0])
def test_proposals_are_optimal(rate, most, overlaps):
    found, link = few_units(), HostLink(bytes_per_second=rate, overlaps=overlaps)
    every = [choice for choice in every_choice(found, link) if choice[1] <= most]
    proposed = list(offload_proposals(found, passes(link), most))
    assert proposed or rate < 1e9, "a link that is slow enough is not worth its use"
    for policies in proposed:
        kept, moved, seconds = figures(found, policies, link)
        assert 0 < moved <= most
        best = min(s for size, _, s in every if size <= kept)
        assert seconds == pytest.approx(best, rel=1e-4)


def test_an_input_that_can_neither_stay_nor_go():
    found = few_units()
    link = HostLink(bytes_per_second=1e9)
    proposed = list(offload_proposals(found, passes(link), 100.0))
    assert all(figures(found, p, link)[0] >= CARRY for p in proposed)


def test_a_pass_takes_the_longer_of_work_and_link():
    rates = Rates(flops_per_second=1.0, bytes_per_second=1.0, host_bytes_per_second=10.0)
    assert with_copies(2.0, 5.0, 10.0, rates) == 2.0 + 5.0
    assert with_copies(2.0, 5.0, 30.0, rates) == 3.0 + 5.0
    assert with_copies(2.0, 5.0, 80.0, rates) == 8.0 + 8.0
    waiting = dataclasses.replace(rates, host_overlaps=False)
    assert with_copies(2.0, 5.0, 30.0, waiting) == 2.0 + 3.0 + 5.0 + 3.0


@pytest.fixture(scope="module")
def stack():
    return steps.stacks_of(steps.step_for)


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
    assert " compiled of 200.00 KiB" in found.summary
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


DEEP = 24
WIDE = 4 * 512 * 64  # bytes of a carry, and of the one product of a block


def deep_step(plan):
    """A deep stack of a wide carry; a block has one product, and keeps two arrays of its size."""
    block = lambda x, w: jnp.sin(x @ w)
    loss = lambda w, x: jaxckpt.scan_blocks(block, w, x, remat=plan).sum()
    shapes = ((DEEP, 64, 64), (512, 64))
    return jax.grad(loss), tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)


def carries_held(plan) -> int:
    """Returns what a compiler that only does what it has to holds of a plan, in carries."""
    kept = worst = 0
    for stage in plan.bind(DEEP).stages:
        schedule, count = schedule_of(stage), stage.bound_count
        has_input = not stage.offloads_carry
        values = 2 if not stage.policies else sum(p.kind != "offload" for p in stage.policies)
        if stage.schedule == "none":
            kept, live = kept + 2 * count, 0
        elif schedule is None:
            values = 0 if not stage.policies else values
            kept, live = kept + count * (has_input + values), 2 * (not values)
        else:
            longest = math.ceil(count / stage.argument) if stage.schedule == "uniform" else 0
            kept += has_input * (schedule.peak_slots + 1) + longest * max(values, 1)
            live = 2 + 2 * stage.offloads_carry
        worst = max(worst, kept + live)
    return worst


def deep_fit(carries: int, on_host: int) -> FitResult:
    """Returns the answer for budgets in carries, of the device and of the host."""
    peak = lambda plan: report((carries_held(plan) * WIDE) / 2**30)
    asked = {"target": LOCAL, "budget": carries * WIDE + 4, "host_budget": on_host * WIDE}
    return fit_module.solve(Steps(deep_step, LOCAL, peak), DEEP, **asked)


def test_a_schedule_on_the_host_is_the_fastest_that_fits(chip):
    """Room for five carries here and eight there: not for all blocks' inputs on either side."""
    found = deep_fit(5, on_host=8)
    stage = found.plan.stages[0]
    assert stack_executor.runs(stage) and stage.offloads_carry
    assert 0 < found.chosen.host_bytes <= 8 * WIDE
    where = "carries in slots on the host, a segment's residuals in turn"
    assert found.keeps[0].endswith(where)
    without = deep_fit(5, on_host=0)
    assert found.chosen.seconds < without.chosen.seconds
    assert found.report.peak_bytes <= found.budget_bytes


@pytest.mark.parametrize("on_host", [0, 1])
def test_a_host_with_too_little_room_gets_nothing(chip, on_host):
    """The least that a schedule has there is two carries."""
    found = deep_fit(5, on_host)
    assert not any(stage.offloads_carry for stage in found.plan.stages)
    assert not any(
        stack_executor.runs(s) and s.offloads_carry for one in found.table for s in one.plan.stages
    )


def test_a_host_with_room_for_all_needs_no_schedule(chip):
    found = deep_fit(5, on_host=2 * DEEP)
    assert all(stage.schedule == "full" and stage.offloads_carry for stage in found.plan.stages)


@pytest.mark.parametrize("given", ["12XB", -1, "0.1B"])
def test_bad_host_budgets(given):
    with pytest.raises(ValueError, match=r"^host_budget: ") as caught:
        jaxckpt.fit(steps.step_for, num_blocks=6, budget="1MiB", host_budget=given)
    assert "\n" not in str(caught.value)
