"""Only the gradients that are asked for are made: frozen weights and tables leave no residuals."""

import chex
import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.costs.flops import count_flops

LENGTH, WIDTH, ROWS = 6, 32, 64
PLANS = ("uniform:2", "uniform:2+names:hidden", "sqrt", "log", "binomial:2")


def block(x, block_i, table):
    x, steps = x
    hidden = jaxckpt.tag(jnp.tanh(x @ block_i["up"]), "hidden")
    return (x + (hidden * table) @ block_i["down"], steps + hidden.sum()), None


def stack(params, table, x, plan):
    body = lambda carry, block_i, table: block(carry, block_i, table)[0]
    return jaxckpt.scan_blocks(body, params, (x, jnp.zeros([])), table, remat=plan)


def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "up": 0.2 * jax.random.normal(keys[0], (LENGTH, WIDTH, 2 * WIDTH)),
        "down": 0.2 * jax.random.normal(keys[1], (LENGTH, 2 * WIDTH, WIDTH)),
    }
    table = jax.random.normal(keys[2], (ROWS, 2 * WIDTH))
    return params, table, jax.random.normal(keys[3], (ROWS, WIDTH))


def gradient(plan, wanted):
    """Returns `fn(params, table, x) -> gradients` of what is in `wanted` alone."""

    def fn(params, table, x):
        args = {**params, "table": table, "x": x}

        def loss(moving):
            now = args | moving
            stacked = {"up": now["up"], "down": now["down"]}
            return jnp.square(stack(stacked, now["table"], now["x"], plan)[0]).sum()

        return jax.grad(loss)({name: args[name] for name in wanted})

    return fn


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("wanted", [("x",), ("down",), ("up", "table"), ("table",)])
def test_some_gradients_are_those_of_none(plan, wanted):
    got = jax.jit(gradient(plan, wanted))(*inputs())
    want = jax.jit(gradient("none", wanted))(*inputs())
    chex.assert_trees_all_close(got, want, rtol=2e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_frozen_weights_cost_no_products(plan):
    flops = lambda plan, wanted: count_flops(jax.make_jaxpr(gradient(plan, wanted))(*inputs()))
    everything = ("up", "down", "table", "x")
    product = 2 * ROWS * WIDTH * 2 * WIDTH
    assert flops("none", everything) - flops("none", ("down", "x")) == LENGTH * product
    assert flops(plan, everything) - flops(plan, ("down", "x")) == LENGTH * product
    assert flops(plan, everything) - flops(plan, ("x",)) == 2 * LENGTH * product
    assert flops(plan, ("x",)) > flops("none", ("x",))  # it does run blocks again


def test_a_table_that_is_not_asked_for_leaves_no_residuals():
    temp = lambda wanted: jaxckpt.measure(gradient("uniform:1", wanted), *inputs()).temp_bytes
    # Of a block the table's gradient reads `hidden` once more, which is kept anyway; what it adds
    # is the gradient itself. The weights' residual is the input of each product.
    assert temp(("x",)) < temp(("x", "table", "up", "down"))


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_an_output_without_a_gradient_is_zero():
    params, table, x = inputs()
    for place in (0, 1):
        loss = lambda params, plan, place=place: stack(params, table, x, plan)[place].sum()
        want = jax.jit(jax.grad(loss), static_argnums=1)(params, "none")
        for plan in PLANS:
            got = jax.jit(jax.grad(loss), static_argnums=1)(params, plan)
            chex.assert_trees_all_close(got, want, rtol=2e-5, atol=1e-5)


def test_a_chain_makes_what_is_asked_for_alone():
    params, _, x = inputs()
    schedule = jaxckpt.schedules.binomial(LENGTH, slots=2)

    def loss(moving, frozen, remat):
        blocks = [
            lambda x, i=i: x + jnp.tanh(x @ (moving if i % 2 else frozen)[i]) for i in range(LENGTH)
        ]
        return jaxckpt.chain(blocks, x, remat=remat).sum()

    weights = params["up"][:, :, :WIDTH]
    both = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    one = jax.jit(jax.grad(loss), static_argnums=2)
    chex.assert_trees_all_close(
        one(weights, weights, schedule), both(weights, weights, "none")[0], rtol=2e-5, atol=1e-5
    )
    count = lambda fn: count_flops(jax.make_jaxpr(fn, static_argnums=2)(weights, weights, schedule))
    product = 2 * ROWS * WIDTH * WIDTH
    # Block 0 is frozen, so the input of block 1 needs no gradient, and block 0 no second run.
    assert count(both) - count(one) == (LENGTH // 2 + 2) * product
