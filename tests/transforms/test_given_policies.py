"""`remat=` takes any policy of `jax.checkpoint`: its gradients, and what it saves, are the same."""

import collections
import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from jax import ad_checkpoint, lax

import jaxckpt
from jaxckpt.plans import as_plan
from tests.transforms import cases

LENGTH = 5
JAXS = jax.checkpoint_policies


def keeps_tanh(primitive, *_, **__):
    """A user's own, which answers with all that JAX knows but a move to the host."""
    return ad_checkpoint.Saveable if primitive.name == "tanh" else ad_checkpoint.Recompute


@dataclasses.dataclass(frozen=True)
class KeepsLarge:
    """One with fields."""

    least: int

    def __call__(self, primitive, *avals, **params):
        return primitive.name == "dot_general" and avals[0].size >= self.least


@dataclasses.dataclass  # with `==` and without a hash
class KeepsAll:
    def __call__(self, *_, **__):
        return True


POLICIES = {
    "nothing": JAXS.nothing_saveable,
    "everything": JAXS.everything_saveable,
    "dots": JAXS.dots_with_no_batch_dims_saveable,
    "names": JAXS.save_only_these_names("hidden"),
    "both": JAXS.save_from_both_policies(JAXS.dots_saveable, JAXS.save_only_these_names("hidden")),
    "host": JAXS.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["hidden"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "own": keeps_tanh,
    "fields": KeepsLarge(cases.BATCH * cases.WIDTH),
}


def with_jax(policy):
    """Returns a stack as it is written without jaxckpt."""

    def run(params, carry, scale):
        block = lambda carry, block_i: cases.dropout_block(carry, block_i, scale)
        block = jax.checkpoint(block, policy=policy, prevent_cse=False)
        return lax.scan(lambda carry, block_i: (block(carry, block_i), None), carry, params)[0]

    return run


def with_jaxckpt(remat):
    return lambda *args: jaxckpt.scan_blocks(cases.dropout_block, args[0], *args[1:], remat=remat)


def of_arrays(run):
    """Returns `run` of arrays that have gradients, and those."""
    params, carry, scale = cases.dropout_stack(LENGTH)
    key = params.pop("key")
    return lambda params, carry, scale: run({**params, "key": key}, carry, scale), (
        params,
        carry,
        scale,
    )


def gradients(run):
    run, args = of_arrays(run)
    loss = lambda *args: jnp.sin(run(*args)).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args)


def saved(run, args) -> collections.Counter:
    """Returns the types of what the backward pass is handed."""
    kept = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], *args)
    return collections.Counter(f"{x.dtype}{x.shape}" for x in jax.tree.leaves(kept))


def weight(run, args) -> int:
    """Returns how many numbers the backward pass is handed."""
    kept = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], *args)
    return sum(x.size for x in jax.tree.leaves(kept))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dots", "host", "own"])
def test_gradients_are_those_under_jax(name):
    policy = POLICIES[name]
    chex.assert_trees_all_close(
        gradients(with_jaxckpt(policy)), gradients(with_jax(policy)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_what_is_saved_is_what_jax_saves(name):
    policy = POLICIES[name]
    ours, theirs = (saved(*of_arrays(run(policy))) for run in (with_jaxckpt, with_jax))
    assert ours == theirs


def test_the_twin_sees_what_is_saved():
    """It goes red where the policy is not asked, so that nothing, or everything, is saved."""
    of = lambda remat: weight(*of_arrays(with_jaxckpt(remat)))
    kept = {name: of(policy) for name, policy in POLICIES.items()}
    assert kept["nothing"] == of("full")
    for name in set(POLICIES) - {"nothing"}:
        assert kept[name] > kept["nothing"], name
    for name in set(POLICIES) - {"everything"}:
        assert kept[name] < of("none"), name


@pytest.mark.parametrize("policy", [JAXS.nothing_saveable, keeps_tanh])
def test_blocks_run_again(policy):
    # `tanh` is all that the block's backward pass asks for.
    assert cases.count_evaluations(LENGTH, policy).total == 2 * LENGTH
    assert cases.count_evaluations(LENGTH, policy, unroll=LENGTH, nested=True).total == 2 * LENGTH


def test_the_products_that_are_run_again():
    from jaxckpt.costs.flops import count_flops

    def flops(run):
        run, args = of_arrays(run)
        return count_flops(jax.make_jaxpr(jax.grad(lambda *a: run(*a).sum(), (0, 1, 2)))(*args))

    product = 2 * cases.BATCH * cases.WIDTH * 2 * cases.WIDTH
    none = flops(with_jaxckpt("none"))
    for name, policy in POLICIES.items():
        again = flops(with_jaxckpt(policy)) - none
        assert again == flops(with_jax(policy)) - none, name
        assert again == LENGTH * product * (name == "nothing"), name


def chain_of(remat, params, carry, scale):
    blocks = [
        functools.partial(cases.dropout_block, block_i=jax.tree.map(lambda x, i=i: x[i], params))
        for i in range(LENGTH)
    ]
    return jaxckpt.chain(
        [functools.partial(block, scale=scale) for block in blocks], carry, remat=remat
    )


@pytest.mark.slow
def test_a_chain():
    """Unrolled, so that no residual is of two blocks."""
    policy = keeps_tanh

    def plain(params, carry, scale):
        for i in range(LENGTH):
            block = jax.checkpoint(cases.dropout_block, policy=policy)
            carry = block(carry, jax.tree.map(lambda x, i=i: x[i], params), scale)
        return carry

    ours = functools.partial(chain_of, policy)
    chex.assert_trees_all_close(gradients(ours), gradients(plain), rtol=1e-6, atol=1e-6)
    count = lambda run: sum(
        n for kind, n in saved(*of_arrays(run)).items() if f"({cases.BATCH}," in kind
    )
    assert count(ours) == count(plain)
    assert (
        count(functools.partial(chain_of, "full"))
        < count(ours)
        < count(functools.partial(chain_of, "none"))
    )


def test_a_loop_with_outputs():
    policy, w, x = keeps_tanh, jnp.eye(8) / 2, jnp.ones([3, 8])
    step = lambda carry, _: (carry * jnp.sin(jnp.tanh(carry @ w)), carry.sum())
    ours = lambda remat: lambda x: jaxckpt.scan(step, x, length=LENGTH, remat=remat)
    wrapped = jax.checkpoint(step, policy=policy, prevent_cse=False)
    assert saved(ours(policy), [x]) == saved(lambda x: lax.scan(wrapped, x, length=LENGTH), [x])
    assert weight(ours("full"), [x]) < weight(ours(policy), [x]) < weight(ours("none"), [x])


@pytest.mark.slow
def test_under_vmap():
    policy = JAXS.save_only_these_names("hidden")
    params, carry, scale = cases.dropout_stack(LENGTH)
    batch = jnp.stack([carry, 2 * carry])
    grad = lambda remat: jax.vmap(jax.grad(lambda x: with_jaxckpt(remat)(params, x, scale).sum()))(
        batch
    )
    chex.assert_trees_all_close(grad(policy), grad("none"), rtol=1e-5, atol=1e-6)


def test_called_without_jit_it_compiles_once():
    params, carry, scale = cases.dropout_stack(LENGTH)
    traces = []

    def policy(primitive, *avals, **_):
        traces.append(primitive)
        return False

    grad = jax.grad(lambda x, remat: with_jaxckpt(remat)(params, x, scale).sum())
    grad(carry, policy)
    count = len(traces)
    grad(carry, policy)
    assert 0 < len(traces) <= 2 * count
    # A second policy is no first one.
    grad(carry, JAXS.save_only_these_names("hidden"))
    other = saved(
        lambda x: with_jaxckpt(JAXS.save_only_these_names("hidden"))(params, x, scale), [carry]
    )
    assert other != saved(lambda x: with_jaxckpt(policy)(params, x, scale), [carry])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=False):
        hidden = jnp.tanh(jaxckpt.tag(nn.Dense(32)(x), "hidden"))
        return x + nn.Dense(16)(nn.Dropout(0.3)(hidden, deterministic=deterministic))


def linen_saved(model):
    x = jnp.ones([4, 16])
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = jax.jit(model.init)(keys, x)
    run = lambda params, x: model.apply(params, x, rngs={"dropout": jax.random.key(2)})
    return weight(run, (params, x)), jax.jit(jax.grad(lambda p: run(p, x).sum()))(params)


@pytest.mark.slow
def test_linen():
    policy = keeps_tanh
    ours, grads = linen_saved(jaxckpt.linen.remat(Layer, policy)())
    theirs, expected = linen_saved(nn.remat(Layer, policy=policy)())
    assert linen_saved(jaxckpt.linen.remat(Layer, "full")())[0] < ours == theirs
    chex.assert_trees_all_close(grads, expected, rtol=1e-6, atol=1e-6)

    stack = lambda remat: linen_saved(jaxckpt.linen.Stack(Layer, LENGTH, remat=remat))
    ours, grads = stack(policy)
    assert stack("full")[0] < ours < stack("none")[0]
    chex.assert_trees_all_close(grads, stack("none")[1], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_nnx():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(16, 16, rngs=rngs)
            self.dropout = nnx.Dropout(0.3, rngs=rngs)

        def __call__(self, x):
            return x + self.dropout(jnp.tanh(jaxckpt.tag(self.dense(x), "hidden")))

    def grads_and_saved(remat):
        stack = jaxckpt.nnx.Stack(Block, LENGTH, remat=remat, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(stack, nnx.Param, ...)
        run = lambda params, x: nnx.merge(graph, params, jax.tree.map(jnp.copy, rest))(x)
        x = jnp.ones([4, 16])
        return jax.jit(jax.grad(lambda p: run(p, x).sum()))(params), saved(run, (params, x))

    ours, kept = grads_and_saved(JAXS.save_only_these_names("hidden"))
    expected, of_names = grads_and_saved("names:hidden")
    chex.assert_trees_all_close(ours, expected, rtol=1e-6)
    assert kept == of_names != grads_and_saved("full")[1]


def test_explain():
    params, carry, scale = cases.dropout_stack(LENGTH)
    one = jax.tree.map(lambda x: x[0], params)
    explain = lambda plan: jaxckpt.explain(cases.dropout_block, one, carry, scale, plan=plan)
    ours, theirs = explain(JAXS.save_only_these_names("hidden")), explain("names:hidden")
    assert ours.rows == theirs.rows != explain("full").rows
    assert "keeps_tanh: " in str(explain(keeps_tanh))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (JAXS.save_only_these_names, "save_only_these_names takes (*names_which_can_be_saved)"),
        (KeepsAll(), "takes none without a hash; KeepsAll() has none"),
        (lambda primitive: True, "<lambda> takes (primitive)"),
        (lambda *_, **__: None, "the policy <lambda> answers None of"),
        (lambda *_, **__: "hidden", "the policy <lambda> answers 'hidden' of"),
        (lambda *_, **__: ad_checkpoint.Offloadable, "answers <class"),
        (3, "remat is a plan such as 'sqrt' or a jaxckpt.Plan, not 3"),
    ],
)
def test_what_is_no_policy(given, message):
    with pytest.raises(jaxckpt.PlanError, match=re.escape(message)) as error:
        gradients(with_jaxckpt(given))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (JAXS.dots_saveable, "give 'dots' instead"),
        (JAXS.dots_with_no_batch_dims_saveable, "give 'dots_no_batch' instead"),
        (keeps_tanh, "keeps_tanh is a function; a plan that is planned, printed or stored has to"),
    ],
)
@pytest.mark.parametrize("takes", [as_plan, jaxckpt.Plan.parse])
def test_who_needs_data_refuses_it(takes, policy, message):
    with pytest.raises(jaxckpt.PlanError, match=re.escape(message)):
        takes(policy)


def test_the_planner_names_it():
    def step_for(plan):
        loss = lambda w, x: jaxckpt.scan_blocks(
            lambda x, w: jnp.tanh(x @ w), w, x, remat=keeps_tanh
        ).sum()
        return jax.grad(loss), (jnp.ones([4, 8, 8]), jnp.ones([2, 8]))

    with pytest.raises(ValueError, match="its stack runs under 'keeps_tanh'; hand the plan to"):
        jaxckpt.fit(step_for, num_blocks=4, budget="1MiB")
