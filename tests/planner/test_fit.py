"""`jaxckpt.fit` end to end on the CPU: peaks, monotony, FLOPs, gradients, texts."""

import functools
import itertools

import jax
import numpy as np
import pytest

import jaxckpt
from jaxckpt.costs.flops import count_flops
from tests.planner import steps

pytestmark = pytest.mark.xdist_group("fit")


@functools.cache
def fitted(budget: int):
    return jaxckpt.fit(steps.step_for, num_blocks=steps.NUM_BLOCKS, budget=budget)


@functools.cache
def peak_of(plan: str) -> int:
    fn, args = steps.step_for(plan)
    return jaxckpt.measure(fn, *args).peak_bytes


@functools.cache
def least_budget() -> int:
    with pytest.raises(jaxckpt.BudgetError) as caught:
        fitted(1000)
    return caught.value.least_bytes


def budgets() -> list[int]:
    """Six from the least feasible to where nothing is recomputed any more, and that of `none`."""
    return [*map(int, np.linspace(least_budget(), peak_of("dots"), 6)), peak_of("none")]


@pytest.mark.slow
def test_each_compilation_is_told(tmp_path, monkeypatch):
    """Before it and after it, with its peak and whether that fits."""
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))
    told = []
    asked = {"num_blocks": steps.NUM_BLOCKS, "budget": fitted(peak_of("dots")).budget_bytes}
    result = jaxckpt.fit(steps.step_for, **asked, progress=told.append)
    begun, done = ([one for one in told if one.is_done == is_done] for is_done in (False, True))
    assert {one.plan for one in begun} == {one.plan for one in done}
    assert [one.number for one in begun] == [*range(1, len(done) + 1)]
    assert result.num_compiles <= len(done) and result.num_compiles <= 6
    peaks = {one.plan: one.peak_bytes for one in done}
    assert peaks[str(result.plan)] == result.report.peak_bytes and peaks["full"] == peak_of("full")
    first = next(one for one in done if one.plan == "none")
    assert str(first).startswith(f"{first.number} of at most {first.most}: none ")
    assert "MiB, too large, " in str(first) and str(first).endswith(" s")
    assert str(begun[0]) == f"compiling 1 of at most 6: {begun[0].plan}"


def flops_of(plan) -> int:
    fn, args = steps.step_for(plan)
    return count_flops(jax.make_jaxpr(fn)(*args))


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCKPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.heavy
def test_peaks_are_within_the_budget_and_grow_with_it():
    peaks = []
    for budget in budgets():
        result = fitted(budget)
        fn, args = steps.step_for(str(result.plan))
        assert result.report.peak_bytes == jaxckpt.measure(fn, *args).peak_bytes <= budget
        assert result.num_compiles <= 6
        peaks.append(result.report.peak_bytes)
    assert peaks == sorted(peaks)
    assert len(set(peaks)) >= 6


@pytest.mark.heavy
def test_less_memory_is_never_faster():
    seconds = [fitted(budget).chosen.seconds for budget in budgets()]
    assert all(a >= b * (1 - 0.002) for a, b in itertools.pairwise(seconds))


@pytest.mark.heavy
def test_recomputes_no_more_than_a_plain_plan_that_fits():
    plain = {plan: (peak_of(plan), flops_of(plan)) for plan in ("none", "full", "dots", "sqrt")}
    for budget in budgets():
        fitting = [flops for peak, flops in plain.values() if peak <= budget]
        result = fitted(budget)
        assert flops_of(result.plan) == result.chosen.flops
        assert not fitting or result.chosen.flops <= min(fitting)


@pytest.mark.slow
def test_the_largest_budget_recomputes_nothing():
    result = fitted(peak_of("none"))
    assert str(result.plan) == "none"
    assert flops_of(result.plan) == flops_of("none")
    assert "fastest" in result.why


@pytest.mark.slow
def test_the_least_budget_works():
    result = fitted(least_budget())
    assert result.report.peak_bytes == least_budget() < peak_of("full")


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", [0, 3, *(pytest.param(place, marks=pytest.mark.heavy) for place in (1, 2, 4, 5, 6))]
)
def test_gradients_equal_those_without_remat(place):
    args = steps.arguments()
    plan = fitted(budgets()[place]).plan
    loss, grads = jax.jit(steps.step_for(plan)[0])(*args)
    expected_loss, expected = jax.jit(steps.step_for("none")[0])(*args)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), rtol=0)


@pytest.mark.slow
def test_text_says_what_a_user_pastes_and_why():
    budget = budgets()[2]
    result = fitted(budget)
    text = str(result)
    assert text.startswith(f"--remat={result.plan}\n")
    assert jaxckpt.Plan.parse(str(result.plan)) == result.plan
    before = result.table[result.table.index(result.chosen) - 1]
    assert before.compiled_bytes > budget
    assert f"the next faster plan, {before.plan}, needs" in text


@pytest.mark.slow
def test_the_same_answer_again():
    budget = budgets()[2]
    again = jaxckpt.fit(steps.step_for, num_blocks=steps.NUM_BLOCKS, budget=budget)
    assert again == fitted(budget)


@pytest.mark.slow
def test_what_was_compiled_is_read_from_disk(monkeypatch):
    fitted(budgets()[2])
    monkeypatch.setattr("jaxckpt.compiled.peak.compile_lowered", None)
    jaxckpt.fit(steps.step_for, num_blocks=steps.NUM_BLOCKS, budget=budgets()[2])
