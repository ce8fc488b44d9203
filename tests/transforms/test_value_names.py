"""Values without a tag, kept by the names that are invented for them."""

import functools
import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

import jaxckpt
from jaxckpt.costs.flops import count_flops
from jaxckpt.transforms import value_names
from jaxckpt.transforms.cuts import Opened
from jaxckpt.transforms.traced_block import first_block, trace_block
from tests.transforms.invented_cases import (
    ARRAY,
    DOT,
    NUM_BLOCKS,
    ROWS,
    WIDTH,
    arguments,
    block,
    close,
    flops,
    step,
)


@functools.cache
def names() -> tuple[str, ...]:
    rows, x = jax.eval_shape(arguments)
    row = first_block(rows)
    return value_names.offered(
        block, jaxckpt.Plan.parse("names:@*").stages[0].policies, x, row
    ).invented


@functools.cache
def without_remat():
    fn, args = step("none")
    return jax.jit(fn)(*args)


def test_names_of_a_block():
    assert {f"@dot.{n}" for n in range(1, 7)} <= set(names())
    assert {"@cos.1", "@logistic.1", "@tanh.1", "@product.1", "@exp.1"} - set(names()) == {
        "@product.1"  # the user has a tag on it
    }
    assert len(set(names())) == len(names())


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("@dot.1", 1),  # in a custom_vjp
        ("@dot.2", 1),
        ("@dot.3", 3),  # in a loop of three trips
        ("@dot.4", 2),  # in a jax.checkpoint, which runs it again by itself
        ("@dot.5,@dot.6", 1),  # in the branches of a cond
        ("@dot*", 8),
    ],
)
def test_a_kept_product_is_not_run_again(name, calls):
    spared = flops("full") - flops(f"full+names:{name}")
    assert spared == NUM_BLOCKS * calls * DOT


def test_kept_bytes_are_those_of_the_value():
    rows, x = arguments()
    row = jax.tree.map(lambda leaf: leaf[0], rows)
    saved = lambda plan: jaxckpt.explain(block, row, x, plan=plan).saved_bytes
    for name, size in {"@dot.1": 1, "@cos.1": 1, "@dot.3": 3, "@dot.4": 1}.items():
        assert saved(f"names:{name}") - saved("full") == size * ARRAY, name


@pytest.mark.parametrize(
    "plan",
    [
        "2xfull/names:@*",
        pytest.param("uniform:2+names:@dot.2,@cos*", marks=pytest.mark.heavy),
    ],
)
def test_gradients_equal_none(plan):
    fn, args = step(plan)
    close(jax.jit(fn)(*args), without_remat())


def test_the_executor_spares_the_product_too():
    """Every block is recorded once; what its derivative needs of a kept product is not `mine`."""
    spared = flops("uniform:2+names:mine") - flops("uniform:2+names:@dot.2")
    assert spared == NUM_BLOCKS * DOT


@pytest.mark.slow
def test_a_chain_and_stacks_of_flax():
    x = jnp.ones([ROWS, WIDTH])
    dense = lambda layer: lambda x: jnp.sin(jnp.tanh(layer(x)))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return dense(nn.Dense(WIDTH))(x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return dense(self.dense)(x)

    def of_linen(plan):
        stack = jaxckpt.linen.Stack(Linen, NUM_BLOCKS, remat=plan)
        params = stack.init(jax.random.key(0), x)
        return jax.grad(lambda params: stack.apply(params, x).sum()), params

    def of_nnx(plan):
        stack = jaxckpt.nnx.Stack(Nnx, NUM_BLOCKS, remat=plan, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(stack, nnx.Param, ...)
        return jax.grad(lambda p: nnx.merge(graph, p, rest)(x).sum()), params

    def of_chain(plan):
        w = 0.3 * jax.random.normal(jax.random.key(0), (NUM_BLOCKS, WIDTH, WIDTH))
        blocks = lambda w: [dense(lambda x, w_i=w_i: x @ w_i) for w_i in w]
        # With the value, so that the last block runs forward under every plan.
        return jax.value_and_grad(lambda w: jaxckpt.chain(blocks(w), x, remat=plan).sum()), w

    for make in (of_linen, of_nnx, of_chain):
        found = {}
        for plan in ("full", "names:@dot.1"):
            fn, params = make(plan)
            found[plan] = count_flops(jax.make_jaxpr(fn)(params))
        assert found["full"] - found["names:@dot.1"] == NUM_BLOCKS * DOT, make
    kept, none = (jax.jit(of_chain(plan)[0])(params) for plan in ("names:@dot.1", "none"))
    close(kept, none)


def test_the_same_names_in_another_process():
    code = "import json, tests.transforms.test_value_names as t; print(json.dumps(t.names()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert tuple(json.loads(found.stdout.splitlines()[-1])) == names()


def test_a_tag_never_collides():
    """A tag set by JAX's own function may hold any text; it is no invented name."""

    def tricky(x, row):
        y = checkpoint_name(jnp.tanh(x @ row["w"]), "@dot.1")
        return x + jnp.sin(y @ row["w"])

    assert flops("full", tricky) - flops("names:@dot.1", tricky) == NUM_BLOCKS * DOT


def test_globs_over_tags_do_not_reach_invented_names():
    assert flops("names:*") == flops("names:mine")
    assert flops("names:@*") < flops("names:mine")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("names:@dott.1", r"names:@dott.1 matches no untagged value.*mean '@dot.1'.*@dot.1, @cos"),
        ("names:@mine", r"matches no untagged value of the block.*it has: @dot.1"),
        ("names:dot.1", r"names:dot.1 matches no tag of the block.*it has: mine"),
        ("names:@dot.1+offload:@dot.1", r"names:@dot.1 keeps on the device what offload:@dot.1"),
        ("names:@dot.1+offload:@d*", r"names:@dot.1 keeps on the device what offload:@d\*"),
        ("names:a@dot", "'a@dot' in names:a@dot is not valid.*after '@' for"),
    ],
)
def test_bad_names(plan, message):
    with pytest.raises(jaxckpt.PlanError, match=message) as caught:
        step(plan)[0](*step("none")[1])
    assert "\n" not in str(caught.value)


def test_a_block_without_steps_has_no_names():
    with pytest.raises(
        jaxckpt.PlanError, match="matches no untagged value of the block; it has none"
    ):
        jaxckpt.scan_blocks(lambda x, w: x, jnp.ones([2, 3]), jnp.ones(3), remat="names:@dot.1")


def test_linen_remat_keeps_values_without_a_tag():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.tanh(nn.Dense(4)(jnp.tanh(nn.Dense(4)(x))))

    def products(plan):
        block = jaxckpt.linen.remat(Block, plan)()
        variables = Block().init(jax.random.key(0), jnp.ones([2, 4]))
        loss = lambda variables: block.apply(variables, jnp.ones([2, 4])).sum()
        return str(jax.make_jaxpr(jax.grad(loss))(variables)).count("dot_general")

    assert products("full") - 1 == products("names:@dot.1") == products("none") + 1
    assert products("names:@dot.1,@dot.2") == products("none")
    with pytest.raises(jaxckpt.PlanError, match=r"@dot\.9 matches no untagged value"):
        products("names:@dot.9")


def test_no_tag_has_an_at_sign():
    with pytest.raises(jaxckpt.PlanError, match=r"tag '@dot\.1' is not valid"):
        jaxckpt.tag(jnp.ones(3), "@dot.1")


def test_plans_with_invented_names_are_text():
    text = "3xfull+names:@dot.2,@exp2.1,q/uniform:2+offload:@custom_jvp_call.1"
    plan = jaxckpt.Plan.parse(text)
    assert jaxckpt.Plan.parse(str(plan)) == plan
    assert str(plan) == text.replace("3xfull+names", "3xnames")
    # Tags and invented names of one spelling are two values.
    jaxckpt.Plan.parse("names:dot.1+offload:@dot.1")


@pytest.mark.parametrize("fn", [jnp.tanh, jnp.exp, jax.nn.sigmoid, jnp.sqrt])
def test_a_kept_result_serves_its_own_derivative(fn):
    """The derivative of these is a function of their result: with it, their input is not needed."""

    def run(x, row):
        return x + fn(jnp.square(x) @ jnp.square(row["w"]) + 1) @ row["w"]

    rows, x = jax.eval_shape(arguments)
    found = value_names.offered(
        run, jaxckpt.Plan.parse("names:@*").stages[0].policies, x, first_block(rows)
    )
    (name,) = [n for n in found.invented if n[1:5] in ("tanh", "exp.", "logi", "sqrt")]
    assert flops("full", run) - flops(f"names:{name}", run) == NUM_BLOCKS * DOT


@jax.custom_vjp
def pair(x):
    return jnp.sin(x), jnp.tanh(x)


pair.defvjp(lambda x: (pair(x), jnp.tanh(x)), lambda kept, grads: ((1 - kept**2) * grads[1],))


def test_a_custom_vjp_whose_first_output_nobody_reads():
    def run(x, row):
        return x + pair(x @ row["w"])[1] @ row["w"]

    spared = flops("full", run) - flops("names:@tanh.*", run)
    assert spared == NUM_BLOCKS * DOT


def test_forward_mode_works_through_invented_names():
    rows, x = arguments()
    run = lambda x, row: x + jnp.tanh(x @ row["w"])
    fn = lambda x: jaxckpt.scan_blocks(run, rows, x, remat="names:@tanh.1,@dot.1").sum()
    plain = lambda x: jaxckpt.scan_blocks(run, rows, x, remat="full").sum()
    (found, expected) = (jax.jvp(f, (x,), (x,))[1] for f in (fn, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_names_are_the_same_after_the_cast_of_a_literal_is_folded():
    """The variance subtracts the cast of a literal, which the next trace folds."""
    closed, _ = trace_block(
        lambda carry, _: [jnp.tanh(carry[0].var())], [jnp.ones([4], jnp.bfloat16)], ()
    )
    opened = Opened.of(closed.jaxpr).segment(0, Opened.of(closed.jaxpr).num_steps).block.jaxpr
    again = jax.make_jaxpr(core.jaxpr_as_fun(opened))(*opened.in_avals)
    assert len(again.jaxpr.eqns) < len(opened.jaxpr.eqns), "the cast was folded"
    assert value_names.counts(again) == value_names.counts(opened)
