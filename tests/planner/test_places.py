"""Which stacks a step runs, which follow its plan, and which are held at the same time."""

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from tests.planner.steps import stacks_of

LENGTH, WIDTH, ROWS = 6, 8, 32
W = jax.ShapeDtypeStruct((LENGTH, WIDTH, WIDTH), jnp.float32)
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


def block(c, w):
    return c + jnp.tanh(c @ w)


def run(w, x, plan):
    return jaxckpt.scan_blocks(block, w, x, remat=plan)


def towers(plan, w, v, x):
    return (run(w, x, plan) * run(v, x, plan)).sum()


def found(loss, *args, plan="full", other="none"):
    """Returns the stacks of the gradient of `loss(plan, *args)`."""
    made = lambda plan: (jax.grad(lambda *args: loss(plan, *args)), args)
    return stacks_of(made, plan=plan, other=other)


def test_one_stack_counts_once():
    (stack,) = found(lambda plan, w, x: run(w, x, plan).sum(), W, X)
    assert stack.num_blocks == LENGTH and stack.params_bytes == 4 * LENGTH * WIDTH**2


@pytest.mark.parametrize("plan", ["full", "none", "sqrt", "2xfull/none"])
def test_equal_towers_count_each(plan):
    assert len(found(towers, W, W, X, plan=plan, other="dots")) == 2


def test_one_tower_that_runs_twice_counts_twice():
    assert len(found(lambda plan, w, x, y: towers(plan, w, w, x) + y.sum(), W, X, X)) == 2


def test_towers_under_one_jit_are_traced_once_and_count_each():
    once = []

    def tower(w, x, plan):
        once.append(plan)
        return run(w, x, plan)

    tower = jax.jit(tower, static_argnums=2)
    loss = lambda plan, w, v, x: (tower(w, x, plan) * tower(v, x, plan)).sum()
    assert len(found(loss, W, W, X)) == 2
    assert once == [jaxckpt.Plan.parse("full"), jaxckpt.Plan.parse("none")]


def test_what_was_traced_before_is_seen_again():
    inner = jax.jit(lambda w, x, plan: run(w, x, plan).sum(), static_argnums=2)
    loss = lambda plan, w, x: inner(w, x, plan)
    for plan in ("full", "none"):
        jax.make_jaxpr(jax.grad(loss, argnums=1), static_argnums=0)(jaxckpt.Plan.parse(plan), W, X)
    for _ in range(2):
        assert len(found(loss, W, X)) == 1


def accumulated(plan, w, v, x):
    def part(total, x):
        grads = jax.grad(lambda w: towers(plan, w, v, x))(w)
        return total + grads, None

    return jax.lax.scan(part, jnp.zeros_like(w), x.reshape(4, ROWS // 4, WIDTH))[0].sum()


def unrolled(plan, w, v, x):
    parts = x.reshape(4, ROWS // 4, WIDTH)
    return sum(jax.grad(lambda w, x=x: towers(plan, w, v, x))(w).sum() for x in parts)


@pytest.mark.parametrize("step", [accumulated, unrolled, jax.jit(unrolled, static_argnums=0)])
def test_parts_of_a_batch_are_held_one_after_another(step):
    stacks = stacks_of(lambda plan: ((lambda *args: step(plan, *args)), (W, W, X)))
    assert len(stacks) == 2
    assert [stack.carry[0].shape for stack in stacks] == [(ROWS // 4, WIDTH)] * 2


def test_what_a_custom_derivative_traces_again_counts_once():
    def loss(plan, w, x):
        @jax.custom_vjp
        def inner(w, x):
            return run(w, x, plan).sum()

        def forward(w, x):
            out, reverse = jax.vjp(lambda w, x: run(w, x, plan).sum(), w, x)
            return out, reverse

        inner.defvjp(forward, lambda reverse, grad: reverse(grad))
        return inner(w, x)

    assert len(found(loss, W, X)) == 1


def test_a_shape_alone_counts_as_nothing():
    def loss(plan, w, x):
        jax.eval_shape(lambda w: run(w, x, plan), w)
        jax.eval_shape(jax.grad(lambda w: run(w, x, plan).sum()), w)
        return run(w, x, plan).sum()

    assert len(found(loss, W, X)) == 1
    with pytest.raises(ValueError, match="the program is the same"):
        fit(lambda plan, w, x: (jax.eval_shape(lambda w: run(w, x, plan), w), w.sum())[1])


def test_a_stack_in_a_checkpointed_function_counts_once():
    loss = lambda plan, w, x: jax.checkpoint(lambda w: jnp.sin(run(w, x, plan)).sum())(w)
    assert len(found(loss, W, X)) == 1
    used = lambda plan, w, x: (x * jax.checkpoint(lambda w: run(w, x, plan))(w) ** 2).sum()
    assert len(found(used, W, X)) == 1


def test_of_a_cond_one_branch_counts():
    def loss(plan, w, v, x):
        both = lambda w, v: towers(plan, w, v, x)
        return jax.lax.cond(x[0, 0] > 0, both, lambda w, v: run(w, x, plan).sum(), w, v)

    assert len(found(loss, W, W, X)) == 2


@pytest.mark.parametrize("fixed", ["full", "none", "sqrt", "uniform:2"])
def test_a_stack_with_a_plan_of_its_own_does_not_follow(fixed):
    other = jax.ShapeDtypeStruct((2, WIDTH, WIDTH), jnp.float32)
    loss = lambda plan, w, v, x: run(v, run(w, x, plan), fixed).sum()
    assert [stack.num_blocks for stack in found(loss, W, other, X)] == [LENGTH]
    # The two are told apart by their plans, not by their shapes.
    assert len(found(loss, W, W, X)) == 1


def fit(loss, num_blocks=LENGTH, args=(W, X), budget=2**30):
    made = lambda plan: (jax.grad(lambda *args: loss(plan, *args)), args)
    return jaxckpt.fit(made, num_blocks=num_blocks, budget=budget)


@pytest.mark.parametrize(("fixed", "asked"), [("full", "none"), ("none", "full"), ("log", "full")])
def test_a_step_that_ignores_its_plan(fixed, asked):
    expected = f"step_for ignores its plan: asked for '{asked}', its stack runs under '{fixed}'"
    with pytest.raises(ValueError, match=expected):
        fit(lambda plan, w, x: run(w, x, fixed).sum())


def test_named_stacks_are_told_apart_by_what_changed():
    """Whatever else in the step runs under the plans that are asked for."""

    def step_for(plans):
        def loss(w, v, u, x):
            out = run(u, run(w, x, plans["first"]), "full")
            return run(v, run(v, out, plans["second"]), plans["second"]).sum()

        return jax.grad(loss, argnums=(0, 1)), (W, W, W, X)

    result = jaxckpt.fit(step_for, num_blocks={"second": LENGTH, "first": LENGTH}, budget=2**30)
    assert list(result.plan) == ["first", "second"]  # in the order in which they run
    keeps = [line.partition(":")[0] for line in result.keeps]
    assert keeps == ["first", "second"]
