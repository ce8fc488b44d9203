"""The Linen adapters: one parameter tree for every plan, errors, the wrapped class."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import jaxckpt
from jaxckpt import PlanError
from jaxckpt.memory.flops import count_flops
from tests.transforms.cases import relative_error

X = jnp.linspace(-1, 1, 24).reshape(4, 6)


class Mlp(nn.Module):
    features: int = 6

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        y = nn.tanh(jaxckpt.tag(nn.Dense(12)(x), "hidden"))
        y = nn.Dropout(0.3, deterministic=deterministic)(y)
        return x + nn.Dense(self.features)(y)


class Model(nn.Module):
    plan: str

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = jaxckpt.linen.Stack(Mlp, 5, remat=self.plan, name="layers")(
            x, deterministic=deterministic
        )
        return nn.Dense(1)(x)


RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


def loss(variables, plan, deterministic=False):
    rngs = {"dropout": jax.random.key(2)}
    return Model(plan).apply(variables, X, deterministic=deterministic, rngs=rngs).sum()


def test_tree_is_the_same_for_every_plan():
    trees = [Model(plan).init(RNGS, X) for plan in ("none", "full", "sqrt", "2xdots/log")]
    for tree in trees[1:]:
        chex.assert_trees_all_equal(trees[0], tree)
    shapes = jax.tree.map(jnp.shape, trees[0]["params"])
    assert shapes["layers"]["Dense_0"] == {"kernel": (5, 6, 12), "bias": (5, 12)}


def test_blocks_start_from_different_parameters():
    kernel = Model("full").init(RNGS, X)["params"]["layers"]["Dense_0"]["kernel"]
    assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.01


@pytest.mark.parametrize("plan", ["full", "dots", "names:hid*", "uniform:2", "sqrt", "binomial:2"])
def test_gradients_with_dropout_equal_none(plan):
    variables = Model("none").init(RNGS, X)
    run = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    assert relative_error(run(variables, plan), run(variables, "none")) <= 1e-6


def test_dropout_is_on_and_off():
    variables = Model("none").init(RNGS, X)
    assert abs(loss(variables, "sqrt") - loss(variables, "sqrt", True)) > 1e-3


def test_plan_recomputes():
    variables = Model("none").init(RNGS, X)
    count = lambda plan: count_flops(jax.make_jaxpr(lambda v: jax.grad(loss)(v, plan))(variables))
    assert count("none") == count("names:hidden") < count("full") < count("4xfull/1xnone") * 2
    assert count("full") > count("3xnone/full")


def test_a_block_without_parameters():
    class Double(nn.Module):
        @nn.compact
        def __call__(self, x):
            return 2 * x

    stack = jaxckpt.linen.Stack(Double, 3, remat="sqrt")
    assert jnp.allclose(stack.apply(stack.init(RNGS, X), X), 8 * X)


def test_blocks_with_state_are_refused():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(x)

    with pytest.raises(ValueError, match=r"keeps state in batch_stats.*LayerNorm"):
        jaxckpt.linen.Stack(Normed, 3).init(RNGS, X)


def test_partition_metadata_gets_the_stacked_axis():
    class Sharded(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
            return nn.Dense(6, kernel_init=init)(x)

    stack = jaxckpt.linen.Stack(Sharded, 3, remat="log")
    variables = stack.init(RNGS, X)
    assert variables["params"]["Dense_0"]["kernel"].names == ("blocks", "in", "out")
    stack.apply(variables, X)


class Loop(nn.Module):
    plan: str

    @nn.compact
    def __call__(self, x):
        block = jaxckpt.linen.remat(Mlp, self.plan)
        for _ in range(3):
            x = block(features=6)(x)
        return x.sum()


def test_remat_class_keeps_names_and_gradients():
    variables = Loop("none").init(RNGS, X)
    run = lambda plan: jax.value_and_grad(Loop(plan).apply)(variables, X)
    for plan in ("full", "dots", "names:h*"):
        chex.assert_trees_all_equal(Loop(plan).init(RNGS, X), variables)
        assert relative_error(run(plan), run("none")) <= 1e-6


def test_remat_class_recomputes():
    variables = Loop("none").init(RNGS, X)
    count = lambda plan: count_flops(jax.make_jaxpr(jax.grad(Loop(plan).apply))(variables, X))
    assert count("full") > count("none") == count("dots") == count("names:hidden")


@pytest.mark.parametrize(
    "plan, message",
    [
        ("sqrt", "speaks of several blocks.*linen.Stack takes every plan"),
        ("2xfull/none", "speaks of several blocks"),
        ("offload:carry", "offload:carry needs the blocks' inputs"),
        ("dotz", "is not a schedule or policy"),
    ],
)
def test_remat_class_refuses_schedules(plan, message):
    with pytest.raises(PlanError, match=message):
        jaxckpt.linen.remat(Mlp, plan)


def test_remat_class_finds_a_name_that_matches_nothing():
    variables = Loop("none").init(RNGS, X)
    with pytest.raises(PlanError, match=r"names:hiden matches no tag.*did you mean 'hidden'"):
        Loop("names:hiden").apply(variables, X)


def test_stack_takes_a_partial():
    stack = jaxckpt.linen.Stack(functools.partial(Mlp, features=6), 2, remat="full")
    assert stack.apply(stack.init(RNGS, X), X).shape == X.shape
