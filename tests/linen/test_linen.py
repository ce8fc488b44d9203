"""The Linen adapters: one parameter tree for every plan, errors, the wrapped class."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import jaxckpt
from jaxckpt import PlanError
from jaxckpt.costs.flops import count_flops
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


@pytest.mark.slow
def test_tree_is_the_same_for_every_plan():
    trees = [Model(plan).init(RNGS, X) for plan in ("none", "full", "sqrt", "2xdots/log")]
    for tree in trees[1:]:
        chex.assert_trees_all_equal(trees[0], tree)
    shapes = jax.tree.map(jnp.shape, trees[0]["params"])
    assert shapes["layers"]["Dense_0"] == {"kernel": (5, 6, 12), "bias": (5, 12)}


@pytest.mark.slow
def test_blocks_start_from_different_parameters():
    kernel = Model("full").init(RNGS, X)["params"]["layers"]["Dense_0"]["kernel"]
    assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["full", "dots", "names:hid*", "uniform:2", "sqrt", "binomial:2"])
def test_gradients_with_dropout_equal_none(plan):
    variables = Model("none").init(RNGS, X)
    run = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    assert relative_error(run(variables, plan), run(variables, "none")) <= 1e-6


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_stack_takes_a_partial():
    stack = jaxckpt.linen.Stack(functools.partial(Mlp, features=6), 2, remat="full")
    assert stack.apply(stack.init(RNGS, X), X).shape == X.shape


def test_remat_takes_a_partial():
    block = jaxckpt.linen.remat(functools.partial(Mlp, features=6), "full")()
    assert block.apply(block.init(RNGS, X), X).shape == X.shape


@pytest.mark.parametrize("wrap", [jaxckpt.linen.remat, jaxckpt.linen.Stack])
def test_an_instance_is_no_class(wrap):
    name = wrap.__name__
    with pytest.raises(ValueError, match=rf"linen.{name} takes the class Mlp or.*not an instance"):
        wrap(Mlp(), 3)
    with pytest.raises(ValueError, match=rf"linen.{name} takes a module class.*, not 3"):
        wrap(3, Mlp)


def test_a_number_of_blocks():
    with pytest.raises(PlanError, match=r"num_blocks is a whole number of blocks, not 3\.0"):
        jaxckpt.linen.Stack(Mlp, 3.0)


# Python values as arguments: `if train:` in the block.


class Trained(nn.Module):
    @nn.compact
    def __call__(self, x, scale, train=False, act="tanh"):
        y = getattr(jnp, act)(nn.Dense(6)(x))
        return x + scale * nn.Dropout(0.3, deterministic=not train)(y)


class TrainedLoop(nn.Module):
    plan: str

    @nn.compact
    def __call__(self, x, scale, *args, **kwargs):
        for _ in range(3):
            x = jaxckpt.linen.remat(Trained, self.plan)()(x, scale, *args, **kwargs)
        return x


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["none", "full", "dots"])
@pytest.mark.parametrize("make", [TrainedLoop, lambda plan: jaxckpt.linen.Stack(Trained, 3, plan)])
def test_python_values_stay_what_they_are(make, plan):
    scale = jnp.float32(1.1)
    variables = make("none").init(RNGS, X, scale)
    rngs = {"dropout": jax.random.key(3)}

    def run(plan, *args, **kwargs):
        loss = lambda *args: make(plan).apply(*args, **kwargs, rngs=rngs).sum()
        return jax.grad(lambda v, x, scale: loss(v, x, scale, *args), (0, 1, 2))(
            variables, X, scale
        )

    by_position = run(plan, True, "sin")
    want = run("none", train=True, act="sin")
    assert relative_error(by_position, want) <= 1e-6
    assert relative_error(run(plan, train=True, act="sin"), want) <= 1e-6
    assert relative_error(run(plan, False, "sin"), want) > 1e-3, "the dropout is on"
    assert relative_error(run(plan, True), want) > 1e-3, "the function is another"


def test_a_python_number_is_weakly_typed():
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x, scale):
            return x + scale * nn.Dense(6, dtype=x.dtype, param_dtype=x.dtype)(x)

    x = X.astype(jnp.bfloat16)
    stack = jaxckpt.linen.Stack(Scaled, 3, remat="uniform:2")
    assert stack.apply(stack.init(RNGS, x, 0.5), x, 0.5).dtype == jnp.bfloat16


def test_an_argument_that_is_static_by_position():
    class Chosen(nn.Module):
        @nn.compact
        def __call__(self, x, which):
            return nn.Dense(6)(x) if which else x  # a traced array has no truth value

    block = jaxckpt.linen.remat(Chosen, "full", static_argnums=2)()
    assert block.apply(block.init(RNGS, X, jnp.bool_(True)), X, jnp.bool_(True)).shape == X.shape


# State that appears while a block runs.


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "norm", jnp.square(x).mean())
        return x + nn.Dense(6)(x)


class SowsLoop(nn.Module):
    plan: str

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = jaxckpt.linen.remat(Sows, self.plan)()(x)
        return x


def test_what_is_sown_in_a_stack_is_refused_where_it_is_wanted():
    stack = jaxckpt.linen.Stack(Sows, 3, remat="sqrt")
    variables = stack.init(RNGS, X)
    assert stack.apply(variables, X).shape == X.shape
    assert stack.apply(variables, X, mutable=["batch_stats"])[1] == {}
    said = r"state in intermediates\.norm.*carry=\('intermediates',\).*or leave 'intermediates'"
    for mutable in (["intermediates"], "intermediates", True):
        with pytest.raises(ValueError, match=said):
            stack.apply(variables, X, mutable=mutable)
    with pytest.raises(ValueError, match=r"intermediates\.Dense_0\.__call__"):
        stack.apply(variables, X, mutable=["intermediates"], capture_intermediates=True)


def test_a_variable_that_is_made_at_apply_is_refused():
    class Late(nn.Module):
        @nn.compact
        def __call__(self, x):
            if self.is_mutable_collection("cache") and not self.is_initializing():
                self.variable("cache", "last", lambda: x)
            return x + nn.Dense(6)(x)

    stack = jaxckpt.linen.Stack(Late, 3)
    variables = {"params": jaxckpt.linen.Stack(Sows, 3).init(RNGS, X)["params"]}
    with pytest.raises(ValueError, match=r"keeps state in cache\.last.*decode with a loop"):
        stack.apply(variables, X, mutable=["cache"])


@pytest.mark.parametrize("capture", [False, True])
def test_what_is_sown_in_a_checkpointed_class_is_returned(capture):
    variables = SowsLoop("none").init(RNGS, X)
    run = lambda plan: SowsLoop(plan).apply(
        variables, X, mutable=["intermediates"], capture_intermediates=capture
    )
    assert len(jax.tree.leaves(run("none")[1])) == (7 if capture else 2)
    for plan in ("full", "dots"):
        chex.assert_trees_all_close(run(plan), run("none"), rtol=1e-6)


# Modules, streams and fields of the model around a block.


class Shares(nn.Module):
    shared: nn.Module

    @nn.compact
    def __call__(self, x):
        noise = jax.random.normal(self.make_rng("noise"), x.shape)
        return x + jaxckpt.tag(nn.tanh(self.shared(nn.Dense(6)(x))), "hidden") * noise


class SharesLoop(nn.Module):
    plan: str

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(6, name="shared")
        for _ in range(3):
            x = jaxckpt.linen.remat(Shares, self.plan)(shared)(x)
        return x.sum()


@pytest.mark.slow
def test_a_checkpointed_class_is_seen_with_all_that_it_shares():
    """The tags are those of the module that is called, with its parent's modules and streams."""
    keys = {"params": jax.random.key(0), "noise": jax.random.key(1)}
    variables = SharesLoop("none").init(keys, X)
    assert sorted(variables["params"]) == ["Shares_0", "Shares_1", "Shares_2", "shared"]
    rngs = {"noise": jax.random.key(2)}
    run = lambda plan: jax.value_and_grad(SharesLoop(plan).apply)(variables, X, rngs=rngs)
    for plan in ("full", "names:hidden"):
        chex.assert_trees_all_equal(SharesLoop(plan).init(keys, X), variables)
        assert relative_error(run(plan), run("none")) <= 1e-6
    with pytest.raises(PlanError, match=r"names:hiden matches no tag.*did you mean 'hidden'"):
        run("names:hiden")


@pytest.mark.slow
def test_a_stack_of_blocks_that_would_share_is_refused():
    class Around(nn.Module):
        template: bool

        @nn.compact
        def __call__(self, x):
            options = {"parent": None} if self.template else {"name": "shared"}
            block = functools.partial(Shares, nn.Dense(6, **options))
            return jaxckpt.linen.Stack(block, 3, name="layers")(x)

    keys = {"params": jax.random.key(0), "noise": jax.random.key(1)}
    with pytest.raises(ValueError, match=r"the block's shared is the module 'shared' of the model"):
        Around(template=False).init(keys, X)
    params = Around(template=True).init(keys, X)["params"]
    assert params["layers"]["shared"]["kernel"].shape == (3, 6, 6)


@pytest.mark.slow
def test_one_key_serves_every_stream():
    """As in Linen: a stream without a key of its own is drawn from the parameters' key."""
    stack = jaxckpt.linen.Stack(functools.partial(Shares, nn.Dense(6)), 3, remat="log")
    variables = stack.init(jax.random.key(0), X)
    one, other = (stack.apply(variables, X, rngs=jax.random.key(seed)) for seed in (1, 2))
    assert relative_error(one, other) > 1e-3
