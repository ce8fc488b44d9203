"""What an answer depends on: the step, the target and the budget, and nothing else."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt.costs.roofline import UNKNOWN
from jaxckpt.planner import inside_block
from jaxckpt.planner.fit import answer, solve
from jaxckpt.planner.kinds import kind_cost
from jaxckpt.planner.problem import Problem
from jaxckpt.planner.steps import Steps
from jaxckpt.plans import Plan, PlanError
from jaxckpt.targets.target import LOCAL
from tests.experiments.test_fit import report
from tests.planner import steps

W = jax.ShapeDtypeStruct((8, 32, 32), jnp.float32)
X = jax.ShapeDtypeStruct((2048, 32), jnp.float32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))


def peak_of(step_for, plan) -> int:
    fn, args = step_for(plan)
    return jaxckpt.measure(fn, *args).peak_bytes


@pytest.mark.slow
def test_budgets_are_answered_as_if_each_were_the_only_one():
    of = Steps(steps.step_for, LOCAL)
    peaks = [of.report(Plan.parse(text)).peak_bytes for text in ("full", "none")]
    budgets = [1, *map(int, np.linspace(0.7 * peaks[0], peaks[1], 6))]

    def asked(order):
        problem = Problem.of(of, steps.NUM_BLOCKS, UNKNOWN, None)
        rungs, found = problem.ladder(), {}
        for budget in order:
            try:
                found[budget] = answer(problem, rungs, budget).as_json()
            except jaxckpt.BudgetError as error:
                found[budget] = error.as_json()
        return found

    one, other = asked(budgets), asked(budgets[::-1])
    assert one == other
    alone = {budget: asked([budget])[budget] for budget in budgets[:3]}
    assert alone.items() <= one.items()
    assert len({str(found.get("plan")) for found in one.values()}) > 2
    assert len(of.compiled) > 6, "what one budget compiled serves the others"


def towers(plan, *, together: bool = True):
    """Returns the step of two equal stacks: both read the input, or the second reads the first."""
    block = lambda c, w: c + jnp.tanh(c @ w)

    def loss(p, x):
        y = jaxckpt.scan_blocks(block, p["a"], x, remat=plan)
        return (y * jaxckpt.scan_blocks(block, p["b"], x if together else y, remat=plan)).sum()

    return jax.grad(loss), ({"a": W, "b": W}, X)


def predictions(step_for, *plans: str) -> dict[str, int]:
    problem = Problem.of(Steps(step_for, LOCAL), 8, UNKNOWN, None)
    drafts = {str(draft.plan): problem._of_step(draft) for draft in problem._drafts()}
    return {plan: drafts[plan].predicted_bytes for plan in plans}


@pytest.mark.slow
def test_equal_towers_are_predicted():
    found = predictions(towers, "none", "full", "names:@tanh.1")
    assert min(found.values()) > 4 * (2 * 8 * 32**2 + 2048 * 32)
    for plan, predicted in found.items():
        assert predicted == pytest.approx(peak_of(towers, plan), rel=0.02)
    # A tower alone keeps half as much, so that a tower forgotten would be seen.
    (stack,) = {stack.carry_bytes for stack in steps.stacks_of(towers)}
    assert len(steps.stacks_of(towers)) == 2 and stack == 4 * 2048 * 32


@pytest.mark.slow
@pytest.mark.parametrize("together", [True, False])
def test_schedules_of_equal_towers_are_predicted(together):
    """Towers that begin together hold one array more under `full` and `none`."""
    step_for = lambda plan: towers(plan, together=together)
    for plan, predicted in predictions(
        step_for, "uniform:2", "binomial:1", "log", "4xbinomial:1/4xnone"
    ).items():
        assert predicted == pytest.approx(peak_of(step_for, plan), rel=0.03), plan


def fourier(x, w):
    """A block whose values are complex in the middle: JAX's policies by name cannot keep them."""
    h = jnp.fft.fft(jaxckpt.tag(x @ w, "product"))
    return x + jnp.tanh(jnp.fft.ifft(h * jnp.conj(h)).real)


def fourier_step(plan):
    w = jax.ShapeDtypeStruct((6, 16, 16), jnp.float32)
    x = jax.ShapeDtypeStruct((2048, 16), jnp.float32)
    return jax.grad(lambda w, x: jaxckpt.scan_blocks(fourier, w, x, remat=plan).sum()), (w, x)


@pytest.mark.slow
def test_a_block_is_planned_without_the_values_that_cannot_be_kept():
    top, low = (peak_of(fourier_step, plan) for plan in ("none", "full"))
    for budget in map(int, np.linspace(low, top, 4)):
        found = jaxckpt.fit(fourier_step, num_blocks=6, budget=budget)
        assert found.report.peak_bytes <= budget and not found.left_out
    stacks = steps.stacks_of(fourier_step)
    with pytest.raises(PlanError, match="complex64"):
        kind_cost(stacks, Plan.parse("names:@fft.1").stages[0], UNKNOWN, 0.0)
    units = inside_block.Graph.of(stacks[0], UNKNOWN).units
    assert units, "others are kept"
    assert not any(jnp.iscomplexobj(value.aval) for unit in units for value in unit.values)


@pytest.mark.slow
def test_values_that_cannot_be_named_do_not_end_the_search(monkeypatch, caplog):
    def fail(block, *, opens_remat):
        raise AssertionError("varying axes")

    monkeypatch.setattr(inside_block, "all_named", fail)
    with caplog.at_level(logging.DEBUG):
        found = jaxckpt.fit(steps.step_for, num_blocks=steps.NUM_BLOCKS, budget="1GiB")
    plans = [str(one.plan) for one in found.candidates]
    assert not any("@" in plan for plan in plans) and any("names:hidden" in plan for plan in plans)
    assert "varying axes" in caplog.text  # with its traceback


@pytest.mark.slow
def test_a_plan_that_does_not_run_is_left_out_and_said():
    def step_for(plan):
        if str(plan) == "dots":
            raise AssertionError("this one breaks")
        return steps.step_for(plan)

    budget = peak_of(steps.step_for, "dots")
    assert str(jaxckpt.fit(steps.step_for, num_blocks=6, budget=budget).plan) == "dots"
    found = jaxckpt.fit(step_for, num_blocks=6, budget=budget)
    assert found.left_out == ("dots: AssertionError: this one breaks",)
    assert found.report.peak_bytes <= budget and str(found.plan) != "dots"
    assert f"  left out   {found.left_out[0]}" in str(found)
    assert jaxckpt.planner.result.FitResult.from_json(found.as_json()) == found


@pytest.mark.slow
def test_a_step_that_never_runs_raises_its_own_error():
    def step_for(plan):
        if str(plan) not in ("full", "none", "3xfull/3xnone"):
            raise AssertionError("none of these")
        return steps.step_for(plan)

    with pytest.raises(AssertionError, match="none of these"):
        jaxckpt.fit(step_for, num_blocks=6, budget=peak_of(steps.step_for, "none") - 1)


def answers_of(step_for, num_blocks, name_of, budget: int):
    """Returns the ladder for peaks of a compiler that likes every mix: (plan, peak, seconds)."""
    peaks = {"full": 400_000, "none": 3_000_000}
    reported = lambda plan: report(peaks.get(str(name_of(plan)), 800_000) / 2**30)
    found = solve(Steps(step_for, LOCAL, reported), num_blocks, target=LOCAL, budget=budget)
    rows = [(name_of(one.plan), one.predicted_bytes, one.seconds) for one in found.candidates]
    return rows, name_of(found.plan), found.num_compiles


@pytest.mark.slow
@pytest.mark.parametrize("budget", [10_000_000, 900_000])
def test_one_stack_with_a_name_is_planned_as_one_without(budget):
    named = lambda plans: steps.step_for(plans["only"])
    with_name = answers_of(named, {"only": 6}, lambda plans: plans["only"], budget)
    assert with_name == answers_of(steps.step_for, 6, lambda plan: plan, budget)


@pytest.mark.slow
def test_a_stack_of_one_block_is_planned():
    one_block = lambda plan: steps.step_for(plan, num_blocks=1)
    rows, plan, _ = answers_of(one_block, 1, lambda plan: plan, 3_000_000)
    assert str(plan) == "none" and rows[0][:2] == (plan, 3_000_000)
    assert str(answers_of(one_block, 1, lambda plan: plan, 400_000)[1]) == "full"
