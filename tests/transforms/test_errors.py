"""What `scan_blocks` and `chain` say to bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.experimental import io_callback

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


def product(x, w):
    return jnp.tanh(x @ w)


def loss_of(w, remat, nested=False):
    return jaxckpt.scan_blocks(product, w, X, remat=remat, nested=nested).sum()


def chain_of(w, remat, nested=False):
    blocks = [lambda x, w_i=w_i: product(x, w_i) for w_i in w]
    return jaxckpt.chain(blocks, X, remat=remat, nested=nested).sum()


SCAN = lambda f: lambda w: jax.lax.scan(lambda c, _: (c + f(w), None), 0.0, None, length=2)[0]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [loss_of, chain_of])
@pytest.mark.parametrize(
    "derivative",
    [
        lambda f: jax.jvp(f, (W,), (W,)),
        lambda f: jax.jvp(jax.jit(f), (W,), (W,)),
        lambda f: jax.linearize(f, W)[1](W),
        lambda f: jax.linearize(jax.jit(f), W)[1](W),
        lambda f: jax.jacfwd(jax.jit(f))(W),
        lambda f: jax.jvp(SCAN(f), (W,), (W,)),
        lambda f: jax.jvp(lambda w: jax.vmap(f)(w[None]).sum(), (W,), (W,)),
        lambda f: jax.grad(lambda w: jax.grad(f)(w).sum())(W),
        lambda f: jax.grad(jax.jit(lambda w: jax.grad(f)(w).sum()))(W),
        lambda f: jax.jacrev(jax.jacrev(f))(W),
    ],
    ids=(
        "jvp",
        "jit",
        "linearize",
        "linear_jit",
        "jacfwd",
        "scan",
        "vmap",
        "twice",
        "jit2",
        "rev2",
    ),
)
def test_derivatives_that_a_schedule_lacks_name_the_plan_that_has_them(loss, derivative):
    with pytest.raises(NotImplementedError, match=r"remat='full' or nested=True has it"):
        jax.block_until_ready(derivative(lambda w: loss(w, "sqrt")))
    if loss is loss_of:  # what the sentence says is so
        jax.block_until_ready(derivative(lambda w: loss(w, "full")))
        jax.block_until_ready(derivative(lambda w: loss(w, "sqrt", nested=True)))


@pytest.mark.heavy
@pytest.mark.parametrize("plan", ["uniform:3", "sqrt", "log", "binomial:2", "3xsqrt/log"])
@pytest.mark.parametrize("loss", [loss_of, chain_of])
def test_forward_over_reverse(loss, plan):
    w = 0.3 * jax.random.normal(jax.random.key(0), W.shape)
    of = lambda plan: lambda w: jnp.sin(loss(w, plan))
    want = jax.jvp(jax.grad(of("none")), (w,), (W,))[1]
    got = jax.jit(lambda: jax.jvp(jax.grad(of(plan)), (w,), (W,))[1])()
    chex.assert_trees_all_close(got, want, atol=1e-5)
    assert float(jnp.abs(want).max()) > 0.1
    if loss is loss_of:
        hessians = [jax.hessian(of(plan))(w) for plan in (plan, "none")]
        chex.assert_trees_all_close(*hessians, atol=1e-5)


def counts_on_the_host(x, w):
    number = io_callback(lambda: np.float32(1), jax.ShapeDtypeStruct((), "float32"))
    return x + number * (x @ w)


@pytest.mark.parametrize("plan", ["full", "dots", "uniform:2", "sqrt", "log", "4xnone/full"])
def test_effects_that_must_happen_once(plan):
    message = r"the block has an effect that must happen once \(io_callback\); remat='none'"
    for run in (
        lambda: jaxckpt.scan_blocks(counts_on_the_host, W, X, remat=plan),
        lambda: jax.jit(lambda w: jaxckpt.scan_blocks(counts_on_the_host, w, X, remat=plan))(W),
        lambda: jaxckpt.chain([lambda x: counts_on_the_host(x, W[0])] * 8, X, remat=plan),
    ):
        with pytest.raises(PlanError, match=message):
            run()
    schedule = jaxckpt.schedules.binomial(8, slots=2)
    with pytest.raises(PlanError, match=message):
        jaxckpt.scan_blocks(counts_on_the_host, W, X, remat=schedule)


def test_effects_that_may_happen_again():
    """`none` runs a block once; what jax.checkpoint repeats, schedules do."""
    run = lambda block, plan: jax.grad(
        lambda w: jaxckpt.scan_blocks(block, w, X, remat=plan).sum()
    )(W)
    chex.assert_trees_all_close(
        run(counts_on_the_host, "none"), run(lambda x, w: x + x @ w, "none")
    )

    def prints(x, w):
        jax.debug.callback(lambda: None)
        return x + jax.pure_callback(np.sin, jax.ShapeDtypeStruct(X.shape, X.dtype), X) @ w

    for plan in ("full", "log"):
        assert run(prints, plan).shape == W.shape


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dots", "uniform:2+dots", "names:product", "4xnone/dots"])
def test_complex_values_cannot_be_kept_by_policies(plan):
    bent = lambda x, w: jnp.tanh(jaxckpt.tag(x @ w, "product"))
    x = X.astype("complex64")
    with pytest.raises(PlanError, match="keeps complex values of the block"):
        jaxckpt.scan_blocks(bent, W, x, remat=plan)
    # A product that no derivative reads is not kept.
    assert jax.grad(lambda w: jaxckpt.scan_blocks(block, w, x, remat=plan).real.sum())(W).shape


@pytest.mark.parametrize(
    "args, message",
    [
        ((W, block, X), "the first argument is the block, .* got an array"),
        (({"w": W}, block, X), "the first argument is the block, .* got a dict of arrays"),
        ((block, block, X), "the second argument is the blocks' parameters; got a function"),
        ((block, list(W), X), "params is a list of 8 trees, .* jnp.stack"),
        ((lambda x, p: x @ p["w"], [{"w": w} for w in W], X), "list of 8 trees, .* jaxckpt.run"),
        ((block, W, X, "sqrt"), "'sqrt' is no array; a plan is given as remat='sqrt'"),
    ],
)
def test_arguments_in_the_wrong_place(args, message):
    with pytest.raises(ValueError, match=message):
        jaxckpt.scan_blocks(*args)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: jaxckpt.run(block, list(W), X), "run takes a list of layers first, .* got block "),
        (lambda: jaxckpt.run({"w": W}, block, X), r"got a dict of float32\[8, .*scan_blocks"),
        (lambda: jaxckpt.run(W, block, X), r"got float32\[8, .*scan_blocks"),
        (lambda: jaxckpt.run(list(W), lambda w, x: x @ w, X, "log"), "given as remat='log'"),
        (lambda: jaxckpt.scan(X, block, W), r"the first argument of scan is .*, not float32\[2, "),
        (lambda: jaxckpt.while_loop(X, block, W, max_steps=3), r"cond of .*, not float32\[2, "),
        (lambda: jaxckpt.tag("name", X), r"tag takes an array and then its name, not float32\["),
    ],
)
def test_other_arguments_in_the_wrong_place(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value), "an array is shown by its shape"


def test_classes_of_another_library():
    class Linen(nn.Module):
        pass

    class Nnx(nnx.Module):
        pass

    for make, message in (
        (lambda: jaxckpt.linen.Stack(Nnx, 4).init(jax.random.key(0), X), "linen.* of one, not Nnx"),
        (lambda: jaxckpt.linen.Stack(block, 4).init(jax.random.key(0), X), "linen.*, not block"),
        (lambda: jaxckpt.nnx.Stack(functools.partial(Linen), 4, rngs=nnx.Rngs(0)), "nnx.*Linen"),
    ):
        with pytest.raises(ValueError, match=f"Stack takes a module class of flax.{message}"):
            make()


def test_a_users_own_error_stays_as_it_is():
    def wrong(x, w):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        jaxckpt.scan_blocks(wrong, W, X)
    # A tuple of stacked arrays is no list of layers where the block can read it.
    assert jaxckpt.scan_blocks(lambda x, p: x @ p[0] + p[1][0], (W, W), X).shape == X.shape


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
