"""The planner over a block without tags: it invents names, and they reproduce what it says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt.costs.flops import count_flops
from tests.planner import steps

pytestmark = pytest.mark.heavy  # one compilation after another; test_fit.py plans in the gate


def untagged(x, block_i, scale):
    """`steps.block` without its tags; a product in a loop, another in `jax.checkpoint`."""
    hidden = jnp.tanh(x @ block_i["w"])
    keep = jax.random.bernoulli(block_i["key"], 0.8, hidden.shape)
    hidden = jnp.where(keep, hidden * scale, 0.0)
    wide = jax.checkpoint(lambda hidden: jax.nn.gelu(hidden @ block_i["u"]))(hidden)
    return x + wide @ block_i["v"]


def step_for(plan):
    return steps.step_for(plan, block=untagged)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    peaks = {
        plan: jaxckpt.measure(step_for(plan)[0], *step_for(plan)[1]).peak_bytes
        for plan in ("full", "none")
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCKPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        budget = (peaks["full"] + peaks["none"]) // 2
        yield jaxckpt.fit(step_for, num_blocks=steps.NUM_BLOCKS, budget=budget)


def test_the_plan_names_values_that_nobody_tagged(fitted):
    named = [one for one in fitted.candidates if "@" in str(one.plan)]
    assert named
    assert any(re.search(r"names:[^/]*@dot\.[12]", str(one.plan)) for one in named)
    assert "@" in str(fitted.plan)


def test_the_printed_plan_reproduces_peak_and_flops(fitted):
    fn, args = step_for(str(fitted.plan))
    peak = jaxckpt.measure(fn, *args).peak_bytes
    assert peak == fitted.report.peak_bytes <= fitted.budget_bytes
    flops = lambda plan: count_flops(jax.make_jaxpr(step_for(plan)[0])(*args))
    assert flops(str(fitted.plan)) == fitted.chosen.flops < flops("full")


def test_gradients_equal_those_without_remat(fitted):
    args = steps.arguments()
    found, expected = (jax.jit(step_for(plan)[0])(*args) for plan in (fitted.plan, "none"))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max(), rtol=0)
