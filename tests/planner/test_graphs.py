"""Plans of one function's graph: where it is cut, what its drafts say, what is found in a step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.costs.flops import count_flops
from jaxckpt.costs.roofline import Rates
from jaxckpt.planner.across_stacks import Part
from jaxckpt.planner.graphs import Region, alive_bytes
from jaxckpt.planner.steps import Steps, find_stacks
from jaxckpt.plans import Plan
from jaxckpt.targets.target import LOCAL
from tests.planner.steps import CHIP
from tests.transforms.cases import relative_error

WIDTH, DEPTH = 32, 3


def unet(params, x, key):
    """Stages of two products with dropout; each way down hands its result to the way up."""

    def stage(p, x, key):
        x = jax.nn.gelu(x @ p["a"])
        keep = jax.random.bernoulli(key, 0.9, x.shape)
        return jnp.tanh(jnp.where(keep, x, 0) @ p["b"])

    keys, skips = iter(jax.random.split(key, 2 * DEPTH)), []
    for p in params["down"]:
        x = stage(p, x, next(keys))
        skips.append(x)
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    for p in params["up"]:
        x = stage(p, jnp.concatenate([x, x]) + skips.pop(), next(keys))
    return x


def arguments(rows: int = 512):
    draw = lambda n: jax.random.normal(jax.random.key(n), (WIDTH, WIDTH)) / 6
    stages = lambda n: [{"a": draw(n + i), "b": draw(n + i + 9)} for i in range(DEPTH)]
    params = {"down": stages(0), "up": stages(20)}
    return params, jax.random.normal(jax.random.key(1), (rows, WIDTH)), jax.random.key(2)


def step_for(plan, fn=unet):
    region = jaxckpt.checkpoint(fn, remat=plan)
    loss = lambda params, x, key: jnp.square(region(params, x, key)).sum()
    return jax.value_and_grad(loss), jax.eval_shape(arguments)


# On the second chip sets of values are worth keeping: kernels take longer than elementwise steps.
CHIPS = {"bytes": CHIP, "both": Rates(flops_per_second=1e12, bytes_per_second=1e10)}


@functools.cache
def part(chip: str = "bytes") -> Part:
    return Part.of("", find_stacks(Steps(step_for, LOCAL), None)[""], CHIPS[chip], 0)


def flops_of(plan) -> int:
    fn, args = step_for(plan)
    return count_flops(jax.make_jaxpr(fn)(*args))


def test_a_function_is_found_and_cut_where_little_is_alive():
    (stack,) = find_stacks(Steps(step_for, LOCAL), None)[""]
    region = Region(stack.region, CHIP)
    assert region.cuts[0] == 0 and region.cuts[-1] == region.opened.num_steps
    assert all(a < b for a, b in itertools.pairwise(region.cuts))
    alive = alive_bytes(region.opened)
    mean = lambda places: sum(alive[place] for place in places) / len(places)
    assert mean(region.cuts[1:-1]) < mean(range(1, region.opened.num_steps))


@pytest.mark.parametrize("chip", CHIPS)
def test_drafts_run_again_what_they_say(chip):
    """The twin of equal gradients: the products that each plan runs again, counted in the step."""
    none, drafts = flops_of("none"), part(chip).graphs
    assert len(drafts) > 3 and len({draft.flops for draft in drafts}) > 2
    assert any("names:@" in str(draft.plan) for draft in drafts) == (chip == "both")
    own = part(chip).kind("none").flops
    for draft in drafts:
        assert Plan.parse(str(draft.plan)) == draft.plan and len(draft.keeps) == len(draft.stages)
        assert flops_of(draft.plan) - none == pytest.approx(draft.flops - own), str(draft.plan)


def test_less_memory_takes_more_time():
    for more, less in itertools.pairwise(part().graphs):
        assert less.worst_bytes < more.worst_bytes and less.seconds >= more.seconds


@pytest.mark.slow
def test_gradients_of_drafts_are_those_of_none():
    fn, _ = step_for("none")
    want = jax.jit(fn)(*arguments())
    for draft in part().graphs[:: max(len(part().graphs) // 3, 1)]:
        fn, _ = step_for(draft.plan)
        assert relative_error(jax.jit(fn)(*arguments()), want) < 1e-6


def test_complex_values_are_left_out_of_what_is_proposed():
    def waves(params, x, key):
        for p in params["down"]:
            x = jnp.tanh(jnp.fft.ifft(jnp.fft.fft(x @ p["a"]) * (1 + 1j)).real @ p["b"])
        return x

    stacks = find_stacks(Steps(functools.partial(step_for, fn=waves), LOCAL), None)[""]
    found = Part.of("", stacks, CHIP, 0).graphs
    assert found
    for draft in found:
        fn, args = step_for(draft.plan, waves)
        jax.make_jaxpr(fn)(*args)


def test_what_cannot_be_planned_is_said():
    nothing = lambda params, x, key: jnp.zeros(3)
    with pytest.raises(ValueError, match="nothing that a function .* is computed from its arguments"):
        find_stacks(Steps(functools.partial(step_for, fn=nothing), LOCAL), None)

    def both(plan):
        def loss(params, x, key):
            rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["down"])
            block = lambda x, p: jnp.tanh(x @ p["a"])
            x = jaxckpt.scan_blocks(block, rows, x, remat=plan)
            return jaxckpt.checkpoint(unet, remat=plan)(params, x, key).sum()

        return jax.grad(loss), jax.eval_shape(arguments)

    with pytest.raises(ValueError, match="a stack of 3, a function; give each a plan of its own"):
        find_stacks(Steps(both, LOCAL), None)


@pytest.mark.slow
def test_fit_finds_functions_and_stacks_without_a_number(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))
    result = jaxckpt.fit(step_for, budget="1GiB")
    assert str(result.plan) == "none" and result.report.peak_bytes <= result.budget_bytes
    with pytest.raises(jaxckpt.BudgetError, match="the least budget is") as caught:
        jaxckpt.fit(step_for, budget=1000)
    least = jaxckpt.fit(step_for, budget=caught.value.least_bytes)
    assert least.report.peak_bytes == caught.value.least_bytes
