"""Several stacks under one budget: an encoder and a decoder, each with a plan of its own.

What compiles is heavy; in the gate docs/planner.md fits two stacks.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt.costs.flops import count_flops
from jaxckpt.planner.across_blocks import Draft, draft, drafts, run_of
from jaxckpt.planner.across_stacks import joined, joints, unbeaten
from jaxckpt.planner.result import FitResult
from jaxckpt.plans.plan_set import PlanSet
from tests.planner.test_pieces import FORWARD, frontier, kinds_of

NUM_BLOCKS = {"decoder": 5, "encoder": 3}
WIDTH, ROWS = 16, 128


def step_for(plans):
    """Returns gradients of an encoder-decoder whose decoder reads the encoder's output."""

    def encode(x, w):
        return x + jnp.sin(jnp.tanh(x @ w) @ w.T)

    def decode(y, w, memory):
        return y + jnp.sin(jnp.tanh(y @ w) * jnp.cos(memory @ w)) @ w.T

    def loss(params, x, y):
        memory = jaxckpt.scan_blocks(encode, params["encoder"], x, remat=plans["encoder"])
        out = jaxckpt.scan_blocks(decode, params["decoder"], y, memory, remat=plans["decoder"])
        return jnp.square(out).sum()

    return jax.grad(loss), jax.eval_shape(arguments)


def arguments():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        name: 0.1 * jax.random.normal(key, (count, WIDTH, 2 * WIDTH))
        for (name, count), key in zip(NUM_BLOCKS.items(), keys, strict=False)
    }
    return params, *(jax.random.normal(key, (ROWS, WIDTH)) for key in keys[2:])


@functools.cache
def peak_of(encoder: str, decoder: str) -> int:
    fn, args = step_for({"encoder": encoder, "decoder": decoder})
    return jaxckpt.measure(fn, *args).peak_bytes


@functools.cache
def fitted(budget: int) -> FitResult:
    return jaxckpt.fit(step_for, num_blocks=NUM_BLOCKS, budget=budget)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCKPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def budgets() -> list[int]:
    with pytest.raises(jaxckpt.BudgetError) as caught:
        fitted(1000)
    least, most = caught.value.least_bytes, peak_of("none", "none")
    return list(map(int, np.linspace(least, most, 5)))


def replayed_peak(stacks, params) -> float:
    """Returns the peak of stages that run and are reversed, event by event.

    Stacks run in order and are reversed in the opposite order; all gradients are counted from the
    start, so one that is not there yet counts negative.
    """
    kept = sum(one.kept_bytes for one in stacks)
    gradients = -sum(params)
    peak = -np.inf
    for one, own in reversed(list(zip(stacks, params, strict=True))):
        gradients += own
        kept -= one.kept_bytes
        peak = max(peak, kept + gradients + one.worst_bytes)
    return peak


@pytest.mark.parametrize("counts", [(1, 1), (2, 3), (4, 2), (1, 2, 2)])
@pytest.mark.parametrize("params", [0.0, 3.0])
def test_joint_plans_equal_brute_force(counts, params):
    weights = [params * count for count in counts]
    kinds = [kinds_of(9, 3.2), kinds_of(5, 3.5), kinds_of(13, 3.1)]
    own = [list(drafts(k, FORWARD, n)) for k, n in zip(kinds, counts, strict=False)]
    names = [f"stack{place}" for place in range(len(counts))]
    every = [
        (replayed_peak(chosen, weights), sum(one.seconds for one in chosen))
        for chosen in itertools.product(*own)
    ]
    found = joints(names, own, weights)
    assert all(isinstance(one, Draft) for one in found)
    assert found[0].plan.keys() == set(names)
    np.testing.assert_allclose(
        frontier((one.worst_bytes, one.seconds) for one in found), frontier(every)
    )


def test_all_that_is_kept_is_alive_at_the_turn():
    none, full, _ = kinds_of(9, 3.2)
    plain = lambda kind, count: draft([run_of(kind, count)])
    make = lambda a, b: joined(("a", "b"), (plain(a, 4), plain(b, 6)), (0.0, 0.0))
    # None keeps 17 a block and holds nothing more; full keeps 1 and holds 16.
    assert make(none, none).worst_bytes == 4 * 17 + 6 * 17
    assert make(full, none).worst_bytes == 4 + 6 * 17
    # Of a kept encoder nothing is freed while the decoder is reversed.
    assert make(none, full).worst_bytes == 4 * 17 + 6 + 16
    assert make(full, full).worst_bytes == 4 + 6 + 16


def test_near_equals_are_dropped_where_there_are_too_many():
    rng = np.random.default_rng(0)
    peak = np.sort(rng.random(5000))
    rows = np.stack([peak, peak, 1 - peak, np.zeros(5000)], axis=1)
    kept = unbeaten(rows)
    assert 40 < len(kept) <= 160
    # For every row there is one that is hardly larger or slower.
    near = [(rows[kept] <= row + 0.05).all(axis=1).any() for row in rows]
    assert all(near)


@pytest.mark.heavy
def test_each_stack_follows_its_own_plan():
    result = fitted(budgets()[2])
    assert result.plan.keys() == NUM_BLOCKS.keys()
    assert all(isinstance(plan, jaxckpt.Plan) for plan in result.plan.values())
    texts = {name: str(plan) for name, plan in result.plan.items()}
    assert peak_of(**texts) == result.report.peak_bytes <= result.budget_bytes
    assert result.num_compiles <= 6
    for name, text in texts.items():
        assert f"{name}: {text}\n" in str(result)
    assert FitResult.from_json(result.as_json()) == result


@pytest.mark.heavy
def test_gradients_equal_those_without_remat():
    args = arguments()
    none = {"encoder": "none", "decoder": "none"}
    found, expected = (jax.jit(step_for(p)[0])(*args) for p in (fitted(budgets()[2]).plan, none))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max(), rtol=0)


@pytest.mark.heavy
def test_budgets_are_kept_and_peaks_grow_with_them():
    results = [fitted(budget) for budget in budgets()]
    peaks = [result.report.peak_bytes for result in results]
    assert peaks == sorted(peaks)
    assert all(result.report.peak_bytes <= result.budget_bytes for result in results)
    seconds = [result.chosen.seconds for result in results]
    assert all(a >= b * (1 - 0.002) for a, b in itertools.pairwise(seconds))
    # The two need not be alike.
    assert any(str(r.plan["encoder"]) != str(r.plan["decoder"]) for r in results)


@pytest.mark.heavy
def test_never_slower_than_one_plan_for_both():
    for budget in budgets():
        fitting = [
            plan for plan in ("none", "full", "dots", "sqrt") if peak_of(plan, plan) <= budget
        ]
        flops = lambda plans: count_flops(jax.make_jaxpr(step_for(plans)[0])(*arguments()))
        both = [flops({"encoder": plan, "decoder": plan}) for plan in fitting]
        assert not both or flops(fitted(budget).plan) <= min(both)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": {}}, "num_blocks is {}; several stacks are given by name"),
        ({"num_blocks": {1: 3}}, "several stacks are given by name, such as"),
        (
            {"num_blocks": {"encoder": 0}},
            r"num_blocks\['encoder'\] is a whole number of blocks, .* not 0",
        ),
        (
            {"num_blocks": {"encoder": 4, "decoder": 5}},
            "num_blocks of 'encoder' is 4, but the step runs a stack of 3 blocks",
        ),
        (
            {"num_blocks": {**NUM_BLOCKS, "third": 2}},
            r"step_for ignores the plan of 'third'.*hand plans\['third'\] to scan_blocks",
        ),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        jaxckpt.fit(step_for, **({"num_blocks": NUM_BLOCKS, "budget": "1MiB"} | options))
    assert "\n" not in str(caught.value)


@pytest.mark.heavy
def test_a_budget_below_all_names_the_plans():
    with pytest.raises(jaxckpt.BudgetError, match=r"no plan fits.*encoder: .*arguments\[0\]") as c:
        fitted(1000)
    assert c.value.plan.keys() == NUM_BLOCKS.keys()
    assert "\n" not in str(c.value)
    again = jaxckpt.BudgetError.from_json(c.value.as_json())
    assert str(again) == str(c.value)


def test_plan_sets():
    plans = PlanSet({"a": "full", "b": "2xsqrt/none"})
    assert plans == {"a": jaxckpt.Plan.parse("full"), "b": jaxckpt.Plan.parse("2xsqrt/none")}
    assert plans != PlanSet({"a": "full"})
    assert hash(plans) == hash(PlanSet({"b": "2xsqrt/none", "a": "full"}))
    assert plans.replace("a", "none") == PlanSet({"a": "none", "b": "2xsqrt/none"})
    assert repr(plans) == "PlanSet({'a': 'full', 'b': '2xsqrt/none'})"
