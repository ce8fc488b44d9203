"""Plans of one function's graph: where it is cut, what its drafts say, what is found in a step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.costs.flops import count_flops
from jaxckpt.planner.across_stacks import Part
from jaxckpt.planner.fit import _in_words
from jaxckpt.planner.graphs import Region, alive_bytes
from jaxckpt.planner.problem import Problem, notes
from jaxckpt.planner.steps import Steps, find_stacks
from jaxckpt.plans import Plan
from jaxckpt.plans.plan_set import PlanSet
from jaxckpt.targets.target import LOCAL
from tests.experiments.test_fit import report
from tests.planner.steps import CHIP
from tests.transforms.cases import relative_error

WIDTH, DEPTH = 32, 3


def unet(params, x, key):
    """Stages of a norm and two products with dropout, and skips from the way down to the way up."""

    def stage(p, x, key):
        x = (x - x.mean(1, keepdims=True)) * jax.lax.rsqrt(x.var(1, keepdims=True) + 1e-5)
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


@functools.cache
def part() -> Part:
    return Part.of("", find_stacks(Steps(step_for, LOCAL), None)[""], CHIP, 0).with_graphs()


def flops_of(plan) -> int:
    fn, args = step_for(plan)
    return count_flops(jax.make_jaxpr(fn)(*args))


def test_a_function_is_found_and_cut_where_little_is_alive():
    (stack,) = find_stacks(Steps(step_for, LOCAL), None)[""]
    assert stack.region is not None
    region = Region(stack.region, CHIP)
    assert region.cuts[0] == 0 and region.cuts[-1] == region.opened.num_steps
    assert all(a < b for a, b in itertools.pairwise(region.cuts))
    alive = alive_bytes(region.opened)
    mean = lambda places: sum(alive[place] for place in places) / len(places)
    assert mean(region.cuts[1:-1]) < mean(range(1, region.opened.num_steps))


@pytest.mark.slow
def test_drafts_run_again_what_they_say():
    """The twin of equal gradients: the products that each plan runs again, counted in the step."""
    none, drafts = flops_of("none"), part().graphs
    assert len(drafts) > 3 and len({draft.flops for draft in drafts}) > 2
    # The names of a segment count from its start, through all its atoms.
    assert any("@div.10" in str(draft.plan) for draft in drafts)
    own = part().kind("none").flops
    for draft in drafts:
        assert Plan.parse(str(draft.plan)) == draft.plan and len(draft.rows) == len(draft.stages)
        assert [row.stage for row in draft.rows] == [str(stage) for stage in draft.stages]
        assert flops_of(draft.plan) - none == pytest.approx(draft.flops - own), str(draft.plan)


def test_rows_add_up_to_their_draft():
    none, turns = part().kind("none"), part().turns
    for draft in part().graphs:
        kept = [row.kept_bytes for row in draft.rows]
        assert sum(kept) == pytest.approx(draft.kept_bytes, abs=len(kept))
        begun = itertools.accumulate(kept)
        held = [now + row.held_bytes for now, row in zip(begun, draft.rows, strict=True)]
        assert turns == 1 and max(held) == pytest.approx(draft.worst_bytes, abs=len(kept))
        again = sum(row.again_seconds for row in draft.rows)
        assert none.seconds + again == pytest.approx(draft.seconds)
        assert len({sum(row.none_bytes for row in one.rows) for one in part().graphs}) == 1


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
    found = Part.of("", stacks, CHIP, 0).with_graphs().graphs
    assert found
    for draft in found:
        fn, args = step_for(draft.plan, waves)
        jax.make_jaxpr(fn)(*args)


def test_what_cannot_be_planned_is_said():
    nothing = lambda params, x, key: jnp.zeros(3)
    with pytest.raises(
        ValueError, match=r"nothing that a function .* is computed from its arguments"
    ):
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


def test_loops_of_unknown_length_are_said():
    def loops(x):
        many = jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x + 1, x)
        return jax.lax.fori_loop(0, 3, lambda _, x: x * 2, many)

    (note,) = notes(jax.make_jaxpr(loops)(jnp.zeros(3)))
    assert note.startswith("the while loop at test_graphs.py:") and "one trip" in note
    assert not list(notes(jax.make_jaxpr(jnp.sin)(1.0)))


SIZES = (32, 64, 32, 8, 128, 32)


def chain_for(plan):
    """A chain of blocks of three products that differ in width, with dropout in one of them."""

    def loss(weights, x, key):
        def block(x, w, i):
            x = jnp.tanh(jnp.tanh(x @ w) @ w.T) @ w
            return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x, 0) if i == 2 else x

        blocks = [functools.partial(block, w=w, i=i) for i, w in enumerate(weights)]
        return jnp.square(jaxckpt.chain(blocks, x, remat=plan)).sum()

    shapes = [jax.ShapeDtypeStruct(pair, jnp.float32) for pair in itertools.pairwise(SIZES)]
    x = jax.ShapeDtypeStruct((512, SIZES[0]), jnp.float32)
    return jax.grad(loss), (shapes, x, jax.eval_shape(jax.random.key, 0))


def test_a_chain_is_planned_block_by_block():
    stacks = find_stacks(Steps(chain_for, LOCAL), None)[""]
    assert [stack.num_blocks for stack in stacks] == [len(SIZES) - 1]
    found = Part.of("", stacks, CHIP, 0).with_graphs()

    def flops(plan):
        fn, args = chain_for(plan)
        return count_flops(jax.make_jaxpr(fn)(*args))

    none = flops("none")
    drafts = [draft for draft in found.drafts(None) if len(draft.stages) > 1]
    assert len(drafts) > 1
    for draft in drafts:
        assert not draft.graph and sum(s.bound_count for s in draft.stages) == len(SIZES) - 1
        own = found.num_blocks * found.kind("none").flops
        assert flops(draft.plan) - none == pytest.approx(draft.flops - own), str(draft.plan)


@pytest.mark.slow
def test_a_function_and_a_stack_share_a_budget(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))

    def both(plans):
        def loss(params, x, key):
            x = jaxckpt.checkpoint(unet, remat=plans["unet"])(params, x, key)
            rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["down"])
            block = lambda x, p: jnp.tanh(x @ p["a"]) @ p["b"]
            return jaxckpt.scan_blocks(block, rows, x, remat=plans["stack"]).sum()

        return jax.grad(loss), jax.eval_shape(arguments)

    result = jaxckpt.fit(both, num_blocks={"unet": 1, "stack": DEPTH}, budget="1GiB")
    assert isinstance(result.plan, PlanSet) and set(result.plan) == {"unet", "stack"}
    assert result.report.peak_bytes <= result.budget_bytes


def compiled(held: float, offset: int = 2**20):
    """Returns steps of a compiler that holds a multiple of what the model tells, and its peaks."""
    peaks = {}

    def report_of(plan):
        inside = 2**19 if plan.graph else {"none": held, "full": held}.get(str(plan), 2**18)
        peaks[str(plan)] = int(offset + inside)
        return report(peaks[str(plan)] / 2**30, temp_bytes=int(inside))

    return Steps(step_for, LOCAL, report_of), peaks


def test_what_xla_holds_of_a_function_is_told_by_the_compiled_none():
    """`full` of a whole function holds as much as `none`, and so it tells nothing."""
    base = part().kind("none").kept_bytes
    problem = Problem.of(compiled(3 * base)[0], None, CHIP)
    found = {str(one.plan): problem._of_step(one) for one in problem._drafts()}
    assert problem.offset_bytes == pytest.approx(2**20, abs=2)
    for word in ("none", "full"):
        assert found[word].predicted_bytes == pytest.approx(2**20 + 3 * base, abs=4)
    (own,), rest = problem.parts, dict(found)
    assert own.kind("none").kept_bytes == pytest.approx(3 * base)
    # JAX's residuals bound what XLA can hold: more of the peak is of the rest of the step.
    most = part().most_bytes
    far = Problem.of(compiled(3 * most)[0], None, CHIP)
    assert far.offset_bytes == pytest.approx(2**20 + 2 * most, abs=4)
    least = min(one.predicted_bytes for one in rest.values())
    assert 2**20 < least < found["none"].predicted_bytes


def test_words_win_unless_a_graphs_plan_saves_more_than_a_twentieth():
    of, peaks = compiled(3 * part().kind("none").kept_bytes)
    problem = Problem.of(of, None, CHIP)
    rungs = problem.ladder()
    words = next(place for place, rung in enumerate(rungs) if str(rung.plan) == "dots")
    graphs = [place for place, rung in enumerate(rungs) if rung.graph]
    for place in (words, *graphs):
        problem.peak(rungs[place].plan)
    budget = peaks["none"] - 1
    for place in graphs:
        is_near = rungs[words].seconds <= 1.05 * rungs[place].seconds
        assert _in_words(problem, rungs, place, budget) == (words if is_near else place)
        assert _in_words(problem, rungs, place, peaks["dots"] - 1) == place
    assert _in_words(problem, rungs, words, budget) == words
