"""What `scan_blocks` and `chain` say to bad input."""

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt import PlanError


def block(x, w):
    return jaxckpt.tag(x @ w, "product") + jaxckpt.tag(x, "input")


W, X = jnp.ones((8, 4, 4)), jnp.ones((2, 4))


@pytest.mark.parametrize(
    "plan, message",
    [
        (
            "names:prodct",
            "plan 'names:prodct': names:prodct matches no tag of the block "
            "(did you mean 'product'?); it has: input, product",
        ),
        ("offload:nope*", "offload:nope* matches no tag of the block; it has: input, product"),
        ("uniform:2+names:zzz", "names:zzz matches no tag"),
        ("names:*t+offload:inp*", "'input' is both kept (names) and moved to the host (offload)"),
        ("attention", "policy 'attention' finds no attention kernel in the block"),
        ("5xfull", "covers 5 blocks, the stack has 8"),
        ("uniform:9", "asks for 9 segments"),
    ],
)
def test_plans_that_do_not_fit_the_block(plan, message):
    with pytest.raises(PlanError) as caught:
        jaxckpt.scan_blocks(block, W, X, remat=plan)
    assert message in str(caught.value)


def test_a_block_without_tags():
    with pytest.raises(PlanError, match=r"it has none; see jaxckpt\.tag"):
        jaxckpt.scan_blocks(lambda x, w: x @ w, W, X, remat="names:q")


@pytest.mark.parametrize(
    "params, message",
    [
        (
            {"a": W, "b": W[:7]},
            r"leading sizes .* differ: params\['a'\] has 8, params\['b'\] has 7",
        ),
        ({"a": W, "b": jnp.ones(())}, r"params\['b'\] is a scalar"),
        ({}, "params has no arrays"),
    ],
)
def test_parameters_that_are_no_stack(params, message):
    with pytest.raises(ValueError, match=message):
        jaxckpt.scan_blocks(lambda x, w: x, params, X, remat="full")


@pytest.mark.parametrize("plan", ["full", "sqrt"])
@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda x, w: (x @ w)[:1], r"carry changes from float32\[2, 4\] to float32\[1, 4\]"),
        (lambda x, w: (x @ w).astype("float16"), r"changes from float32\[2, 4\] to float16"),
        (lambda x, w: (x, x), "the structure changes"),
    ],
)
def test_a_block_that_changes_its_carry(plan, wrong, message):
    with pytest.raises(ValueError, match=message):
        jaxckpt.scan_blocks(wrong, W, X, remat=plan)


@pytest.mark.parametrize("unroll", [0, -1, 1.5, True, "2"])
def test_unroll(unroll):
    with pytest.raises(ValueError, match="unroll is a whole number of blocks"):
        jaxckpt.scan_blocks(lambda x, w: x @ w, W, X, unroll=unroll)


@pytest.mark.parametrize("name", ["", "a b", "carry", "jaxckpt.attention", "q*", 3])
def test_tags_that_no_plan_could_name(name):
    with pytest.raises(PlanError, match="tag"):
        jaxckpt.tag(X, name)


def test_what_comes_later_says_so():
    with pytest.raises(NotImplementedError, match="planner and a budget"):
        jaxckpt.scan_blocks(block, W, X, remat="auto")
    with pytest.raises(NotImplementedError, match="needs the schedule executor"):
        jaxckpt.scan_blocks(block, W, X, remat="binomial:2", nested=True)


def test_the_executor_names_what_has_higher_derivatives():
    def loss(w, remat, nested=False):
        return jaxckpt.scan_blocks(
            lambda x, w: jnp.tanh(x @ w), w, X, remat=remat, nested=nested
        ).sum()

    with pytest.raises(NotImplementedError, match=r"remat='full' or nested=True"):
        jax.hessian(loss)(W, "sqrt")
    with pytest.raises(NotImplementedError, match=r"remat='full' or nested=True"):
        jax.jvp(lambda w: loss(w, "log"), (W,), (W,))
    with pytest.raises(NotImplementedError, match=r"remat='full' or nested=True"):
        jax.grad(lambda w: jax.grad(loss)(w, "log").sum())(W)
    jax.jvp(lambda w: loss(w, "sqrt", nested=True), (W,), (W,))
    jax.jvp(lambda w: loss(w, "full"), (W,), (W,))
    jax.grad(lambda w: jax.grad(loss)(w, "log", nested=True).sum())(W)


def test_chain_needs_blocks():
    with pytest.raises(ValueError, match="at least one block"):
        jaxckpt.chain([], X)


def test_offload_is_refused_where_jax_is_known_to_be_wrong(monkeypatch):
    from jaxckpt.transforms import policies

    monkeypatch.setattr(policies, "_BAD_OFFLOAD", {("cpu", jax.__version__): "wrong gradients"})
    policies.checkpoint_policy.cache_clear()
    with pytest.raises(PlanError, match="offload is refused on jax"):
        jaxckpt.scan_blocks(block, W, X, remat="offload:product")
    # The executors move carries themselves, without a policy.
    with pytest.raises(PlanError, match="offload is refused on jax"):
        jaxckpt.scan_blocks(block, W, X, remat="sqrt+offload:carry")
    with pytest.raises(PlanError, match="offload is refused on jax"):
        jaxckpt.chain([jnp.sin] * 4, X, remat="log+offload:carry")
