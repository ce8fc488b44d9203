"""The optimizer's step inside the backward pass: the separate step's weights, without gradients."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxckpt
from jaxckpt import schedules
from jaxckpt.transforms.accumulate import adding
from jaxckpt.transforms.optimizer_rows import check_blockwise
from tests.transforms.cases import Counter, relative_error

KEY = jax.random.key(0)
L, D, F, V = 6, 8, 16, 5
PARAMS = {
    "blocks": {
        "scale": jnp.ones([L, D]),
        "up": jax.random.normal(jax.random.fold_in(KEY, 1), (L, D, F)) / 3,
        "down": jax.random.normal(jax.random.fold_in(KEY, 2), (L, F, D)) / 3,
    },
    "embedding": jax.random.normal(KEY, (V, D)),
    "head": jax.random.normal(KEY, (D, V)),
}
TOKENS = jax.random.randint(KEY, (3, 4), 0, V)


def block(x, w_key, shift):
    w, key = w_key
    hidden = jnp.tanh((x * w["scale"]) @ w["up"] + shift)
    hidden = jnp.where(jax.random.bernoulli(key, 0.5, hidden.shape), hidden, 0)
    return x + hidden @ w["down"]


def loss_of(remat, block=block):
    def loss(params, tokens):
        x = params["embedding"][tokens]
        items = (params["blocks"], jax.random.split(KEY, L))
        x = jaxckpt.scan_blocks(block, items, x, x.mean(), remat=remat)
        return -jax.nn.log_softmax(x @ params["head"])[..., 0].mean()

    return loss


def decays(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "scale" not in str(path[-1]), params)


def adamw(rate=1e-2):
    return optax.adamw(rate, mask=decays, weight_decay=0.1)


def separate(loss, optimizer):
    def step(params, state, *args):
        value, grads = jax.value_and_grad(loss)(params, *args)
        updates, state = optimizer.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    return jax.jit(step)


def inside(loss, optimizer, **options):
    options = {"blocks": lambda params: params["blocks"], **options}
    return jax.jit(jaxckpt.update_in_backward(loss, optimizer, **options))


def both(remat, optimizer, steps=2, **options):
    one = other = (PARAMS, optimizer.init(PARAMS))
    apart = separate(loss_of(remat), optimizer)
    step = inside(loss_of(remat), optimizer, **options)
    for _ in range(steps):
        value, *one = apart(*one, TOKENS)
        done = step(*other, TOKENS)
        other = (done.params, done.state)
        assert done.value == value and done.is_finite
    return tuple(one), other


SLOW = pytest.mark.slow
PLANS = ["full", "none", "sqrt", "log", "binomial:2", "uniform:2", "dots", "2xfull/4xnone"]


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", *(pytest.param(p, marks=SLOW) for p in PLANS[1:4])])
def test_weights_and_state_are_those_of_the_separate_step(remat):
    one, other = both(remat, adamw(), check=remat == "full")
    assert relative_error(other, one) < 1e-6


@pytest.mark.heavy
@pytest.mark.parametrize(
    "remat", [*PLANS[4:], "full+offload:carry", "3xsqrt/3xdots", schedules.binomial(6, slots=2)]
)
def test_under_every_plan(remat):
    one, other = both(remat, adamw(), check=False)
    assert relative_error(other, one) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none", "sqrt"])
def test_bit_equal_where_the_update_is_one_product(remat):
    """Plain descent rounds in one place; Adam's update is fused in other ways in a loop."""
    one, other = both(remat, optax.sgd(0.5), check=False)
    assert relative_error(other, one) == 0


@pytest.mark.slow
def test_schedules_masks_and_scaled_gradients():
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 1, 5)
    one, other = both("full", adamw(rate), steps=3)
    assert relative_error(other, one) < 1e-6
    optimizer = optax.sgd(0.1)
    step = inside(loss_of("full"), optimizer, check=False)
    half = step(PARAMS, optimizer.init(PARAMS), TOKENS, gradient_scale=0.5)
    whole = step(PARAMS, optimizer.init(PARAMS), TOKENS)
    moved = lambda done: jax.tree.map(jnp.subtract, done.params, PARAMS)
    assert relative_error(moved(half), jax.tree.map(lambda x: x / 2, moved(whole))) < 1e-3
    grads = jax.grad(loss_of("full"))(PARAMS, TOKENS)
    assert abs(whole.gradient_norm / optax.tree.norm(grads) - 1) < 1e-6


@pytest.mark.slow
def test_blocks_are_evaluated_as_the_plan_says():
    """The twin: under `full` each block runs twice, under `none` once."""
    counts = {}
    for remat in ("full", "none"):
        counter = Counter()

        def counted(x, w_key, shift, counter=counter):
            # Of the input: a callback that no block differs in would be moved out of the loop.
            jax.debug.callback(counter, 0 * x.ravel()[0].astype(int))
            return block(x, w_key, shift)

        optimizer = optax.sgd(0.1)
        step = inside(loss_of(remat, counted), optimizer, check=False)
        jax.block_until_ready(step(PARAMS, optimizer.init(PARAMS), TOKENS))
        jax.effects_barrier()
        counts[remat] = counter.counts[0]
    assert counts == {"full": 2 * L, "none": L}


@pytest.mark.slow
def test_gradients_that_are_not_finite_stop_the_update_there():
    def spoilt(x, w_key, shift):
        w, _ = w_key
        made = block(x, w_key, shift)
        # The square root's derivative is infinite where the gate is zero: in block 2.
        return made + 0 * jnp.sqrt(jnp.maximum(w["scale"][0] - 1, 0))

    params = PARAMS | {"blocks": PARAMS["blocks"] | {"scale": jnp.full([L, D], 2.0)}}
    params["blocks"]["scale"] = params["blocks"]["scale"].at[2].set(1.0)
    optimizer = adamw()
    step = inside(loss_of("full", spoilt), optimizer, skip_nonfinite=True, check=False)
    done = step(params, optimizer.init(params), TOKENS)
    assert not done.is_finite and jnp.isfinite(done.value)
    changed = jnp.any(done.params["blocks"]["up"] != params["blocks"]["up"], (1, 2))
    assert changed.tolist() == [False, False, False, True, True, True]
    for name in ("embedding", "head"):
        assert (done.params[name] == params[name]).all()
    assert done.state[0].count == 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(done.params))


@pytest.mark.slow
def test_gradients_of_parts_are_added_in_place():
    loss = loss_of("full")
    add = jax.jit(adding(loss, blocks=lambda params: params["blocks"]))
    totals = jax.tree.map(jnp.ones_like, PARAMS)
    value, totals = add(PARAMS, totals, TOKENS)
    expected, grads = jax.value_and_grad(loss)(PARAMS, TOKENS)
    assert abs(value / expected - 1) < 1e-6
    assert relative_error(totals, jax.tree.map(lambda g: 1 + g, grads)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (
            optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
            "depends on gradients of other parameters, as clipping by the global norm",
        ),
        (
            optax.chain(optax.adam(1e-3), optax.scale_by_param_block_rms()),
            "depends on other blocks of the same parameter",
        ),
        (optax.apply_if_finite(optax.adam(1e-3), 3), "depends on other blocks"),
    ],
)
def test_an_optimizer_that_is_not_of_one_block_is_refused(optimizer, match):
    with pytest.raises(ValueError, match=match):
        check_blockwise(optimizer, PARAMS, (0, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", [adamw(), optax.sgd(0.1, momentum=0.9), optax.lion(1e-3), optax.adamax(1e-3)]
)
def test_optimizers_of_one_block_are_taken(optimizer):
    check_blockwise(optimizer, PARAMS, (0, 1, 2))


def _cast(params, tokens):
    return jaxckpt.scan_blocks(
        lambda x, w: x + (x @ w).sum(),
        params["blocks"]["up"] * 1.0,
        params["embedding"],
        remat="full",
    ).sum()


def _twice(params, tokens):
    run = functools.partial(jaxckpt.scan_blocks, lambda x, w: x * w["scale"].sum(), remat="full")
    return run(params["blocks"], run(params["blocks"], params["embedding"])).sum()


def _penalty(params, tokens):
    return loss_of("full")(params, tokens) + jnp.square(params["blocks"]["up"]).sum()


def _part(params, tokens):
    run = lambda x, w: x * w.sum()
    return jaxckpt.scan_blocks(run, params["blocks"]["up"], params["head"], remat="full").sum()


def _jitted(params, tokens):
    return jax.jit(loss_of("full"))(params, tokens)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (_cast, "the loss runs no stack over the arrays that blocks= returns"),
        (_jitted, "the loss runs no stack over the arrays that blocks= returns"),
        (_twice, "the blocks run twice in the loss"),
        (_penalty, "reads parameters of the blocks outside of their stack too"),
        (_part, "takes 1 of the 3 arrays"),
    ],
)
def test_a_loss_whose_gradient_is_not_whole_is_refused(loss, match):
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=match):
        inside(loss, optimizer, check=False)(PARAMS, optimizer.init(PARAMS), TOKENS)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: inside(3, adamw()), "takes a function as loss, not 3"),
        (lambda: inside(loss_of("full"), 3), "an optimizer with init and update, not 3"),
        (lambda: inside(loss_of("full"), adamw(), blocks=3), "a function as blocks, not 3"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_blocks_that_are_no_part_and_a_state_of_another_optimizer():
    step = inside(loss_of("full"), adamw(), blocks=lambda params: (), check=False)
    with pytest.raises(ValueError, match="returns a part of params"):
        step(PARAMS, adamw().init(PARAMS), TOKENS)
    step = inside(loss_of("full"), adamw(), check=False)
    with pytest.raises(ValueError, match="state is not what"):
        step(PARAMS, optax.lion(1e-3).init(PARAMS), TOKENS)


@pytest.mark.slow
def test_memory_of_a_deep_stack_on_an_absent_tpu():
    """The twin is the separate step, which has the gradients of all blocks at once."""
    blocks, width, hidden, tokens = 16, 1024, 4096, 1024
    one = lambda x, w: x + jnp.tanh(x @ w["up"]) @ w["down"]
    params = {
        "up": jax.ShapeDtypeStruct((blocks, width, hidden), "float32"),
        "down": jax.ShapeDtypeStruct((blocks, hidden, width), "float32"),
    }
    x = jax.ShapeDtypeStruct((tokens, width), "float32")
    optimizer = optax.adamw(1e-3)
    state = jax.eval_shape(optimizer.init, params)

    def loss(params, x):
        return jnp.square(jaxckpt.scan_blocks(one, params, x, remat="full")).mean()

    def step(params, state, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = optimizer.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    updating = jaxckpt.update_in_backward(loss, optimizer, blocks=lambda params: params)
    options = {"target": "v5e-1", "donate_argnums": (0, 1)}
    apart = jaxckpt.measure(step, params, state, x, **options).peak_bytes
    within = jaxckpt.measure(updating, params, state, x, **options).peak_bytes
    stack = sum(leaf.size * 4 for leaf in params.values())
    assert apart > 4 * stack
    assert within < 3 * stack + 114 * 2**20 < apart - 0.7 * stack


@pytest.mark.parametrize("blocks", [lambda params: params["blocks"]["up"] * 2, lambda _: None])
def test_blocks_that_are_no_part_of_the_parameters_are_refused(blocks):
    optimizer = optax.sgd(0.1)
    step = jaxckpt.update_in_backward(loss_of("full"), optimizer, blocks=blocks)
    with pytest.raises(ValueError, match="returns a part of params"):
        step(PARAMS, optimizer.init(PARAMS), TOKENS)
