"""The search over a ladder, without a compiler."""

import random

import pytest

from jaxckpt.planner.across_blocks import Draft
from jaxckpt.planner.search import search
from jaxckpt.plans import Plan


def make(num_rungs: int, seed: int):
    """Returns rungs and their compiled peaks: predictions off by up to 5 %, each family its way."""
    rng = random.Random(seed)
    off = {1: rng.uniform(0.95, 1.05), 2: rng.uniform(0.95, 1.05)}
    rungs, peaks = [], []
    for n in range(num_rungs):
        stages = Plan.parse("full" if rng.random() < 0.3 else "1xfull/none").stages
        predicted = 1_000_000 - 800_000 * n // num_rungs
        numbers = dict(kept_bytes=0.0, worst_bytes=0.0, host_bytes=0.0, flops=0.0)
        rungs.append(Draft(stages=stages, predicted_bytes=predicted, seconds=float(n), **numbers))
        peaks.append(int(predicted * off[len(stages)]))
    peaks.sort(reverse=True)
    return rungs, peaks


@pytest.mark.parametrize("seed", range(40))
def test_finds_the_fastest_that_fits(seed):
    rungs, peaks = make(60, seed)
    budget = random.Random(seed).randint(min(peaks), max(peaks))
    found = search(rungs, budget, peaks.__getitem__, {}, 60)
    assert found.chosen == next(n for n, peak in enumerate(peaks) if peak <= budget)
    assert found.chosen == 0 or found.peaks[found.chosen - 1] > budget
    assert len(found.peaks) <= 12


@pytest.mark.parametrize("seed", range(40))
def test_four_compiles_find_one_that_fits(seed):
    rungs, peaks = make(60, seed)
    budget = random.Random(seed).randint(min(peaks), max(peaks))
    asked = []

    def compile_peak(place):
        asked.append(place)
        return peaks[place]

    found = search(rungs, budget, compile_peak, {0: peaks[0]}, 4)
    assert len(asked) <= 4
    assert peaks[found.chosen] <= budget


@pytest.mark.parametrize("seed", range(10))
def test_what_is_prepared_is_asked_for_next_if_predictions_hold(seed):
    """And what is prepared changes no answer."""
    rungs, peaks = make(60, seed)
    exact = [rung.predicted_bytes for rung in rungs]
    budget = random.Random(seed).randint(min(exact), max(exact))
    for peaks_ in (exact, peaks):
        asked, prepared = [], []

        def compile_peak(place, asked=asked, peaks_=peaks_):
            asked.append(place)
            return peaks_[place]

        found = search(rungs, budget, compile_peak, {}, 60, prepare=prepared.append)
        assert found == search(rungs, budget, peaks_.__getitem__, {}, 60)
        assert [places[0] for places in prepared] == asked
        if peaks_ is exact:
            pairs = [
                (places[1:], after) for places, after in zip(prepared, asked[1:], strict=False)
            ]
            assert all(not beside or beside == [after] for beside, after in pairs)
            assert any(beside for beside, _ in pairs) or len(asked) == 1


def test_a_budget_below_all_compiles_the_last():
    rungs, peaks = make(20, 0)
    found = search(rungs, 10, peaks.__getitem__, {}, 4)
    assert found.chosen is None
    assert found.peaks[19] == peaks[19]


def test_the_last_compilation_is_of_one_that_fits_by_a_margin():
    """Not of the slowest of all, which nobody wants, where another answer is known."""
    rungs, peaks = make(60, 3)
    found = search(rungs, 600_000, peaks.__getitem__, {}, 1, is_answered=True)
    (place,) = found.peaks
    assert 0.85 * 600_000 < rungs[place].predicted_bytes < 0.98 * 600_000


@pytest.mark.parametrize("compiles", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(20))
def test_the_least_peak_is_never_refused(seed, compiles):
    """However far below their peaks the predictions are."""
    rungs, peaks = make(60, seed)
    wrong = [max(peak, 600_000) for peak in peaks[:-1]] + [500_000]
    found = search(rungs, 500_000, wrong.__getitem__, {}, compiles)
    assert found.chosen == len(rungs) - 1


def test_after_a_mixed_plan_that_did_not_fit_one_stage_is_tried():
    """Stages of unequal length may need more than predicted, all of them alike."""
    numbers = dict(kept_bytes=0.0, worst_bytes=0.0, host_bytes=0.0, flops=0.0)
    plans = (("1xfull/none", 99), ("2xfull/none", 96), ("full", 100), ("3xfull/none", 50))
    rungs = [
        Draft(
            stages=Plan.parse(text).stages,
            predicted_bytes=predicted,
            seconds=float(n),
            **numbers,
        )
        for n, (text, predicted) in enumerate(plans)
    ]
    peaks = [103, 102, 100, 50]
    found = search(rungs, 101, peaks.__getitem__, {}, 3)
    assert found.chosen == 2, found.peaks


@pytest.mark.parametrize(("is_answered", "place"), [(True, 0), (False, 2)])
def test_the_last_compilation_dares_more_where_there_is_an_answer_already(is_answered, place):
    numbers = dict(kept_bytes=0.0, worst_bytes=0.0, host_bytes=0.0, flops=0.0)
    rungs = [
        Draft(
            stages=Plan.parse("full").stages,
            predicted_bytes=predicted,
            seconds=float(n),
            **numbers,
        )
        for n, predicted in enumerate((98, 95, 50))
    ]
    found = search(rungs, 100, [98, 95, 50].__getitem__, {}, 1, is_answered=is_answered)
    assert list(found.peaks) == [place] and found.chosen == place
