"""`jaxckpt.scan` beside `jax.lax.scan`: values and gradients, what it keeps, what it runs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxckpt
from jaxckpt import schedules
from jaxckpt.schedules.of_stage import under_loss
from jaxckpt.schedules.segments import two_level
from jaxckpt.transforms.jaxprs import equations
from tests.transforms.cases import Counter, relative_error

WIDTH, BATCH = 6, 3
PLANS = (
    *("none", "full", "dots", "names:hidden", "sqrt", "log", "binomial:1", "binomial:3"),
    *("uniform:1", "uniform:3", "every:4", "uniform:3+dots", "{half}xfull/sqrt"),
    *("full+offload:carry", "sqrt+offload:carry", "binomial:3+offload:carry"),
)
W = 0.4 * jax.random.normal(jax.random.key(0), (WIDTH, WIDTH))
H = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))


def xs_of(length: int) -> dict:
    """Returns floats, integers and keys for as many steps."""
    return {
        "x": jax.random.normal(jax.random.key(2), (length, BATCH, WIDTH)),
        "i": jnp.arange(length),
        "key": jax.random.split(jax.random.key(3), length),
    }


def step_of(w):
    """Returns a step with dropout that closes over `w`; carry and ys are of several dtypes."""

    def step(carry, x):
        h, n = carry
        hidden = jnp.tanh(jaxckpt.tag(h @ w, "hidden") + x["x"] * (1 + x["i"]))
        h = jnp.where(jax.random.bernoulli(x["key"], 0.9, h.shape), hidden, 0.5 * h)
        made = {"h": h, "sum": h.sum(0), "n": n, "key": x["key"], "z": lax.complex(h, -h)}
        return (h, n + 1), made

    return step


LOSSES = {
    "last": lambda carry, ys: jnp.sin(carry[0]).sum(),
    "every": lambda carry, ys: jnp.sin(ys["h"] * (1 + ys["n"])[:, None, None]).sum(),
    "both": lambda carry, ys: carry[0].sum() + jnp.abs(ys["z"]).sum() + (ys["sum"] ** 2).sum(),
    "part": lambda carry, ys: ys["sum"][1:2].sum(),
}


def gradients(scan, length: int, loss: str):
    """Returns carry, ys and the gradients of weights, first carry and xs."""
    xs = xs_of(length)

    def fn(w, h, x):
        carry, ys = scan(step_of(w), (h, 0), {**xs, "x": x})
        ys = {**ys, "key": jax.random.key_data(ys["key"])}
        return LOSSES[loss](carry, ys), (carry, ys)

    return jax.jit(jax.grad(fn, argnums=(0, 1, 2), has_aux=True))(W, H, xs["x"])


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("length", "reverse"), [(1, False), (8, True), (9, False)])
def test_values_and_gradients_are_those_of_lax_scan(plan, length, reverse):
    if length == 1:
        plan = plan.split("/")[0].replace(":3", ":1").replace(":4", ":1")
    plan = plan.format(half=max(1, length // 2))
    loss = {1: "both", 8: "every", 9: "part"}[length]
    run = lambda f, init, xs: jaxckpt.scan(f, init, xs, reverse=reverse, remat=plan)
    expected = gradients(lambda f, init, xs: lax.scan(f, init, xs, reverse=reverse), length, loss)
    found = gradients(run, length, loss)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    as_floats = lambda tree: jax.tree.map(
        lambda x: x if jnp.iscomplexobj(x) else x.astype("float32"), tree
    )
    assert relative_error(as_floats(found), as_floats(expected)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss(loss):
    plain = lambda f, init, xs: lax.scan(f, init, xs, reverse=True)
    expected = gradients(plain, 7, loss)[0]
    for plan in ("sqrt", "uniform:2"):
        run = lambda f, init, xs, plan=plan: jaxckpt.scan(f, init, xs, reverse=True, remat=plan)
        assert relative_error(gradients(run, 7, loss)[0], expected) <= 1e-6


def evaluations(length: int, plan, **options) -> int:
    """Returns how many steps run in one evaluation of a gradient whose loss reads every y."""
    counter = Counter()

    def step(h, x):
        jax.debug.callback(counter, x["i"])
        h = jnp.tanh(h @ W + x["x"])
        return h, h.sum()

    def loss(x):
        xs = {"x": x, "i": jnp.arange(length)}
        return jaxckpt.scan(step, H, xs, remat=plan, **options)[1].sum()

    jax.block_until_ready(jax.jit(jax.grad(loss))(xs_of(length)["x"]))
    jax.effects_barrier()
    assert set(counter.counts) == set(range(length))
    return counter.total


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 5, 16, 19])
def test_as_many_steps_run_as_the_schedule_says(length, reverse):
    count = lambda plan: evaluations(length, plan, reverse=reverse)
    assert count("none") == length
    assert count("full") == 2 * length
    slots = min(3, length)
    for plan, schedule in {
        "sqrt": two_level(length),
        f"binomial:{slots}": schedules.binomial(length, slots),
    }.items():
        expected = length + under_loss(schedule).extra_forwards
        assert count(plan) == count(schedule) == expected, plan
    last = schedules.segment_sizes(length, slots)[-1]
    assert count(f"uniform:{slots}") == 2 * length - last


def temp_bytes(plan, length: int = 256, uses_ys: bool = True, width: int = 64) -> int:
    """Returns temporaries of a gradient: the carry takes 4 KiB, a step's y a quarter of it."""

    def step(h, x):
        h = jnp.tanh(h @ jnp.eye(width) + x)
        return h, jnp.sin(h).sum(0, keepdims=True) * jnp.ones([4, 1])

    def loss(h):
        last, ys = jaxckpt.scan(step, h, None, length, remat=plan)
        return last.sum() + (jnp.sin(ys).sum() if uses_ys else 0.0)

    step = lambda h, _, step=step: step(h, 0.1)
    return jaxckpt.measure(jax.grad(loss), jnp.ones([16, width])).temp_bytes


def test_ys_are_written_once_and_kept_with_no_carry():
    carry, ys = 16 * 64 * 4, 256 * 4 * 64 * 4
    small = temp_bytes("binomial:4", uses_ys=False)
    # Their gradients are an array as large as they are.
    assert temp_bytes("binomial:4") <= small + 2 * ys + 8 * carry
    # The twin: a loop that keeps every carry.
    assert temp_bytes("none", uses_ys=False) >= 256 * carry
    assert small <= 24 * carry


def test_a_y_that_nobody_reads_costs_nothing():
    """Neither memory, nor the products of its derivative, nor a run of it."""
    head = jnp.ones([64, 4096])

    def loss(h, makes_y: bool, reads_y: bool = False):
        step = lambda h, _: (jnp.tanh(h @ jnp.eye(64)), h @ head if makes_y else None)
        last, ys = jaxckpt.scan(step, h, None, 32, remat="binomial:4")
        return last.sum() + (jnp.sum(jnp.sin(ys)) if reads_y else 0.0)

    temps, flops = {}, {}
    for name, options in {"none": (False,), "made": (True,), "read": (True, True)}.items():
        compiled = jax.jit(jax.grad(loss), static_argnums=(1, 2)).lower(jnp.ones([8, 64]), *options)
        compiled = compiled.compile()
        temps[name] = compiled.memory_analysis().temp_size_in_bytes
        flops[name] = compiled.cost_analysis()["flops"]
    assert temps["made"] <= 1.02 * temps["none"] < 0.1 * temps["read"]
    assert flops["made"] <= 1.02 * flops["none"] < 0.1 * flops["read"]


@pytest.mark.parametrize(
    ("plan", "loops"),
    [("sqrt", 0), ("uniform:4", 0), ("every:8", 0), ("uniform:3", 0), ("binomial:4", 1)],
)
@pytest.mark.parametrize("length", [64, 61])
def test_regular_schedules_run_in_loops_of_known_length(plan, loops, length):
    """A loop whose bounds are read from a table is a `while`; a GPU's host waits for each trip."""
    loss = lambda x: jaxckpt.scan(lambda h, x: (jnp.sin(h + x), h), 0.0, x, remat=plan)[1].sum()
    found = [e.primitive.name for e in equations(jax.make_jaxpr(jax.grad(loss))(jnp.ones(length)))]
    assert found.count("while") == loops
    assert "scan" in found


def test_no_steps():
    init = {"h": 1.5, "n": jnp.arange(3)}
    step = lambda carry, x: (carry, (x, carry["n"]))
    for plan in ("sqrt", "none", "binomial:3"):
        for xs in (jnp.zeros([0, 2]), None):
            found = jaxckpt.scan(step, init, xs, length=0, remat=plan)
            expected = lax.scan(step, init, xs, length=0)
            expected = jax.tree.map(jnp.asarray, expected)  # it returns a float as it is
            chex.assert_trees_all_equal(found, expected)
            chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    loss = lambda h: jaxckpt.scan(lambda h, _: (h, h), h, None, 0)[0]
    assert jax.grad(loss)(2.0) == 1.0


def test_scalars_are_as_weak_as_in_lax_scan():
    step = lambda carry, x: (carry * x, carry)
    for init in (1.0, 2, np.float32(1.0)):
        for xs in (jnp.ones(4, "bfloat16"), jnp.ones(4), np.ones(4, "float16")):
            found, expected = jaxckpt.scan(step, init, xs), lax.scan(step, init, xs)
            chex.assert_trees_all_equal(found, expected)
            chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


def test_what_is_closed_over_gets_gradients_in_eager_calls_too():
    def loss(w, scan):
        f = lambda h, x: (jnp.tanh(h @ w["a"] + x), (h * w["b"]).sum())
        return scan(f, H, xs_of(5)["x"])[1].sum()

    weights = {"a": W, "b": jnp.ones(WIDTH)}
    found = jax.grad(loss)(weights, jaxckpt.scan)
    assert relative_error(found, jax.grad(loss)(weights, lax.scan)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["none", "full", "sqrt", "log", "binomial:3", "uniform:3"])
def test_vmap_inside_and_outside(plan):
    """Batched states, xs and weights; the gradient outside keeps none for each example."""
    x = jax.random.normal(jax.random.key(5), (7, 4, BATCH, WIDTH))  # the batch is the second axis

    def run(scan, w, x):
        return scan(lambda h, x: (jnp.tanh(h @ w + x), h.sum(0)), H, x)

    ours = lambda f, init, xs: jaxckpt.scan(f, init, xs, reverse=True, remat=plan)
    plain = lambda f, init, xs: lax.scan(f, init, xs, reverse=True)

    def outside(w, x, scan):
        last, ys = jax.vmap(lambda x: run(scan, w, x), 1)(x)
        assert ys.shape == (4, 7, WIDTH)
        return jnp.sin(last).sum() + jnp.cos(ys).sum()

    inside = lambda scan: jax.vmap(
        jax.grad(lambda w, x: jnp.sin(run(scan, w, x)[1]).sum(), (0, 1)), (None, 1)
    )
    of_all = jax.grad(outside, (0, 1))
    assert relative_error(of_all(W, x, ours), of_all(W, x, plain)) <= 1e-6
    assert relative_error(inside(ours)(W, x), inside(plain)(W, x)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["sqrt", "log", "binomial:3", "uniform:3"])
def test_second_derivatives(plan):
    """Forward mode over reverse mode is right; a second reverse mode is refused by a sentence."""

    def loss(w, scan):
        last, ys = scan(lambda h, x: (jnp.tanh(h @ w + x), h), H, xs_of(5)["x"])
        return jnp.sin(last).sum() + (ys**2).sum()

    ours = lambda *args: jaxckpt.scan(*args, remat=plan)
    product = lambda scan: jax.jvp(jax.grad(lambda w: loss(w, scan)), (W,), (jnp.cos(W),))[1]
    assert relative_error(product(ours), product(lax.scan)) <= 1e-5
    with pytest.raises(NotImplementedError, match=r"second reverse mode.*remat='full'"):
        jax.grad(lambda w: jax.grad(lambda w: loss(w, ours))(w).sum())(W)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((None, H, xs_of(3)["x"]), "first argument of scan is f"),
        ((lambda h, x: (h, x), H), "number of steps is unknown; give length="),
        (
            (lambda h, x: (h, x), H, xs_of(3)["x"], 4),
            "length is 4, but the leading size of xs is 3",
        ),
        ((lambda h, x: (h, x), H, None, -1), "length is a number of steps, at least 0, not -1"),
        ((lambda h, x: (h, x), H, None, 2.0), "length is a whole number of steps, not 2.0"),
        ((lambda h, x: (h, x), H, 3.0), r"xs is a scalar; every leaf is \[L, ...\]"),
        (
            (lambda h, x: (h, x), H, (jnp.ones(3), jnp.ones(4))),
            r"sizes of xs differ: xs\[0\] has 3",
        ),
        ((lambda h, x: h + x, H, xs_of(3)["x"]), r"returns a pair \(carry, y\)"),
        ((lambda h, x: (h[0], x), H, xs_of(3)["x"]), r"carry changes from float32\[3, 6\]"),
        ((lambda h, x: ((h, h), x), H, xs_of(3)["x"]), "the structure changes"),
        ((lambda h, x: (h.astype("bfloat16"), x), H, xs_of(3)["x"]), r"to bfloat16\[3, 6\]"),
    ],
)
def test_bad_input(args, message):
    with pytest.raises(ValueError, match=message) as caught:
        jaxckpt.scan(*args)
    assert "\n" not in str(caught.value)


def test_a_plan_for_another_length():
    step = lambda h, x: (h + x, h)
    with pytest.raises(jaxckpt.PlanError, match=r"4xfull.*3"):
        jaxckpt.scan(step, H, xs_of(3)["x"], remat="4xfull")
    with pytest.raises(ValueError, match="made for 4 blocks, there are 3"):
        jaxckpt.scan(step, H, xs_of(3)["x"], remat=schedules.binomial(4, 2))


def test_scan_blocks_names_scan_where_a_block_returns_a_pair():
    with pytest.raises(ValueError, match=r"jaxckpt.scan takes a block that returns \(carry, y\)"):
        jaxckpt.scan_blocks(lambda h, x: (h, x), xs_of(3)["x"], H)
