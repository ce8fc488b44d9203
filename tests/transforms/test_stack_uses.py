"""Where a stack may stand and what it may hold: the executor against `none` in each.

Every comparison here has its twin in test_recompute.py, or counts evaluations itself.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt import schedules
from jaxckpt.schedules.of_stage import stack_schedule_of, under_loss
from tests.transforms import cases
from tests.transforms.cases import relative_error

ROOT = Path(__file__).parents[2]
PLANS = ("uniform:3", "every:2", "sqrt", "log", "binomial:2")
NUM_BLOCKS = 7


def mixed_block(carry, block_i, scale, shift):
    """A carry of three dtypes; keys and integers among what differs from block to block."""
    keep = jax.random.bernoulli(block_i["key"], 0.8, carry["x"].shape)
    hidden = jnp.tanh(carry["x"] @ block_i["w"] * scale + shift[block_i["row"]])
    return {
        "x": carry["x"] + jnp.where(keep, hidden, 0.0),
        "half": carry["half"] + hidden.astype(jnp.bfloat16),
        "count": carry["count"] + block_i["row"],
    }


def mixed_stack():
    keys = jax.random.split(jax.random.key(0), 4)
    w = 0.4 * jax.random.normal(keys[0], (NUM_BLOCKS, 8, 8))
    fixed = {
        "key": jax.random.split(keys[1], NUM_BLOCKS),
        "row": jnp.arange(NUM_BLOCKS, dtype=jnp.int32) % 3,
    }
    carry = {
        "x": jax.random.normal(keys[2], (4, 8)),
        "half": jnp.ones((4, 8), jnp.bfloat16),
        "count": jnp.int32(5),
    }
    return w, fixed, carry, jnp.float32(1.1), jax.random.normal(keys[3], (3, 8))


def mixed_loss(plan, block=mixed_block):
    _, fixed, carry, _, _ = mixed_stack()

    def loss(w, x, scale, shift):
        start = {**carry, "x": x}
        out = jaxckpt.scan_blocks(block, {"w": w, **fixed}, start, scale, shift, remat=plan)
        return jnp.sin(out["x"]).sum() + out["half"].astype(jnp.float32).sum() * out["count"]

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_mixed_dtypes_keys_integers_and_consts(plan):
    w, _, carry, scale, shift = mixed_stack()
    grads = lambda plan: jax.jit(jax.value_and_grad(mixed_loss(plan), (0, 1, 2, 3)))(
        w, carry["x"], scale, shift
    )
    got, want = grads(plan), grads("none")
    assert relative_error(got, want) <= 1e-6
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(want))


@jax.custom_vjp
def ruled_back(x):
    return jnp.sin(x)


# Rules that are no derivative of what they stand for: a plan that lost one would be seen.
ruled_back.defvjp(lambda x: (jnp.sin(x), x), lambda x, grad: (3 * jnp.cos(x) * grad,))


@jax.custom_jvp
def ruled_ahead(x):
    return jnp.sin(x)


@ruled_ahead.defjvp
def _(primals, tangents):
    return jnp.sin(*primals), 2 * jnp.cos(*primals) * tangents[0]


def kinds_block(carry, w):
    """A carry of keys, complex and whole numbers, and both kinds of rules."""
    key, noise_key = jax.random.split(carry["key"])
    noise = jax.random.normal(noise_key, carry["x"].shape)
    x = carry["x"] + ruled_ahead(ruled_back(carry["x"] @ w) + 0.1 * noise)
    turned = carry["z"] * jnp.exp(1j * x) + 0.1 * carry["count"]
    return {"x": x, "z": turned, "key": key, "count": carry["count"] + 1}


def kinds_gradients(run):
    """Returns a loss of four blocks and its gradients."""
    w = 0.4 * jax.random.normal(jax.random.key(0), (4, 8, 8))
    x = jax.random.normal(jax.random.key(1), (4, 8))

    def loss(w, x):
        key = jax.random.key(2, impl="unsafe_rbg")  # compiles fast
        start = {"x": x, "z": x * (1 + 2j), "key": key, "count": jnp.int32(5)}
        out = run(w, start)
        noise = jax.random.uniform(out["key"])
        return jnp.abs(out["z"]).sum() + noise * jnp.sin(out["x"]).sum() + out["count"]

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(w, x)


@pytest.fixture(scope="module")
def kinds_of_a_loop():
    return kinds_gradients(lambda w, carry: functools.reduce(kinds_block, w, carry))


@pytest.mark.slow
@pytest.mark.parametrize("plan", [*PLANS, "uniform:3+dots", "log+offload:carry"])
def test_every_kind_of_carry_and_of_rule(plan, kinds_of_a_loop):
    def chain(w, carry):
        blocks = [lambda carry, i=i: kinds_block(carry, w[i]) for i in range(4)]
        return jaxckpt.chain(blocks, carry, remat=plan)

    stack = lambda w, carry: jaxckpt.scan_blocks(kinds_block, w, carry, remat=plan)
    for run in (stack, chain):
        assert relative_error(kinds_gradients(run), kinds_of_a_loop) <= 1e-5


def test_a_lost_rule_would_be_seen():
    x = jnp.linspace(-1, 1, 8)
    for ruled, factor in ((ruled_back, 3), (ruled_ahead, 2)):
        grads = [jax.grad(lambda x, f=f: f(x).sum())(x) for f in (ruled, jnp.sin)]
        assert relative_error(grads[0], factor * grads[1]) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_closed_over_values_get_gradients(plan):
    w = 0.3 * jax.random.normal(jax.random.key(0), (NUM_BLOCKS, 8, 8))

    def loss(closed, plan):
        block = lambda x, w: jnp.tanh(x @ w * closed["scale"]) + closed["shift"]
        return jaxckpt.scan_blocks(block, w, jnp.ones((2, 8)), remat=plan).sum()

    closed = {"scale": jnp.float32(1.2), "shift": jnp.full((8,), 0.1)}
    got, want = (jax.grad(loss)(closed, remat) for remat in (plan, "none"))
    assert relative_error(got, want) <= 1e-6 and jnp.abs(want["scale"]) > 0


def twice(plan):
    """A loss with the same stack in it twice, the second on what the first made."""

    def loss(params, x, scale):
        run = lambda x: jaxckpt.scan_blocks(cases.dropout_block, params, x, scale, remat=plan)
        return jnp.sin(run(0.5 * run(x))).sum()

    return loss


def inexact_gradients(loss):
    """Returns gradients of `loss(params, x, scale)` without the keys among the parameters."""

    def split(params, *args):
        moving = {name: leaf for name, leaf in params.items() if name != "key"}
        return jax.grad(lambda p, *a: loss({**p, "key": params["key"]}, *a), (0, 1, 2))(
            moving, *args
        )

    return split


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_twice_in_one_loss(plan):
    args = cases.dropout_stack(NUM_BLOCKS)
    got, want = (jax.jit(inexact_gradients(twice(remat)))(*args) for remat in (plan, "none"))
    assert relative_error(got, want) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_inside_a_scan_that_accumulates(plan):
    params, _, scale = cases.dropout_stack(NUM_BLOCKS)
    parts = jax.random.normal(jax.random.key(3), (3, cases.BATCH, cases.WIDTH))

    def accumulated(plan):
        grads = lambda x: inexact_gradients(twice(plan))(params, x, scale)
        add = lambda total, x: (jax.tree.map(jnp.add, total, grads(x)), None)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(grads, parts[0]))
        return jax.jit(lambda: jax.lax.scan(add, zero, parts)[0])()

    assert relative_error(accumulated(plan), accumulated("none")) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_under_vmap_over_the_batch(plan):
    params, _, scale = cases.dropout_stack(NUM_BLOCKS)
    batch = jax.random.normal(jax.random.key(3), (5, cases.WIDTH))
    rows = lambda plan: jax.jit(jax.vmap(inexact_gradients(twice(plan)), in_axes=(None, 0, None)))(
        params, batch, scale
    )
    assert relative_error(rows(plan), rows("none")) <= 1e-6


@pytest.mark.parametrize("plan", ["sqrt", "binomial:2"])
def test_vmap_runs_a_block_no_more_often(plan):
    """The twin of the test above: under vmap a block is still run by its schedule."""
    counter = cases.Counter()
    w = 0.5 * jnp.ones((NUM_BLOCKS, 4, 4))

    def block(x, block_i):
        jax.debug.callback(counter, block_i["index"])
        return jnp.tanh(x @ block_i["w"])

    def loss(w, x):
        blocks = {"w": w, "index": jnp.arange(NUM_BLOCKS)}
        return jaxckpt.scan_blocks(block, blocks, x, remat=plan).sum()

    jax.block_until_ready(jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(w, jnp.ones((3, 4))))
    jax.effects_barrier()
    (stage,) = jaxckpt.Plan.parse(plan).bind(NUM_BLOCKS).stages
    assert counter.total in (n := NUM_BLOCKS + stack_schedule_of(stage).extra_forwards, 3 * n)


def test_nothing_recompiles_on_a_second_step():
    params, carry, scale = cases.dropout_stack(NUM_BLOCKS)
    traced = []

    @jax.jit
    def step(params, carry, scale):
        traced.append(1)
        return inexact_gradients(twice("log"))(params, carry, scale)

    for _ in range(2):
        jax.block_until_ready(step(params, carry, scale))
    assert len(traced) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        schedules.binomial(NUM_BLOCKS, 2),
        schedules.recursive(NUM_BLOCKS),
        schedules.uniform(NUM_BLOCKS, 3),
        schedules.uniform(NUM_BLOCKS, 3, keep_last=False),
        under_loss(schedules.binomial(NUM_BLOCKS, 2)),
    ],
    ids=lambda value: str(value).partition(":")[0],
)
def test_a_schedule_in_place_of_a_plan(schedule):
    got, want = cases.run(NUM_BLOCKS, schedule), cases.run(NUM_BLOCKS, "none")
    assert relative_error(got, want) <= 1e-6
    counter = cases.count_evaluations(NUM_BLOCKS, schedule)
    assert counter.total == NUM_BLOCKS + under_loss(schedule).extra_forwards


def test_a_schedule_that_does_not_fit():
    w, x = jnp.ones((4, 8, 8)), jnp.ones((2, 8))
    run = lambda schedule, **o: jaxckpt.scan_blocks(jnp.dot, w, x, remat=schedule, **o)
    with pytest.raises(ValueError, match=r"binomial\(slots=2\) is made for 7 blocks, there are 4"):
        run(schedules.binomial(7, 2))
    with pytest.raises(NotImplementedError, match="nested=True runs plans"):
        run(schedules.binomial(4, 2), nested=True)
    apart = schedules.optimal_chain(
        forward=[1] * 4, backward=[2] * 4, carry_bytes=[1] * 5, residual_bytes=[4] * 4, budget=12
    )
    with pytest.raises(ValueError, match=r"jaxckpt\.chain"):
        run(apart)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, jaxckpt
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
assert len(jax.devices()) == 8
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
w = 0.3 * jax.random.normal(jax.random.key(0), (7, 16, 16))
x = jax.random.normal(jax.random.key(1), (8, 16))
block = lambda x, w: x + jnp.tanh(x @ w)
def grads(plan):
    loss = lambda w, x: jnp.sin(jaxckpt.scan_blocks(block, w, x, remat=plan)).sum()
    return jax.jit(jax.grad(loss, (0, 1)))
want = grads("none")(w, x)
wide, data = put(w, None, None, "model"), put(x, "data", None)
for plan in ("uniform:3", "every:2", "sqrt", "log", "binomial:2"):
    compiled = grads(plan).trace(wide, data).lower().compile()
    got = compiled(wide, data)
    for a, b in zip(got, want):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), plan
    assert got[0].sharding.is_equivalent_to(wide.sharding, 3), (plan, got[0].sharding)
    assert got[1].sharding.spec[0] == "data", (plan, got[1].sharding)
    text = compiled.as_text()
    # A device holds half of the stacked weights and a quarter of the carry, never the whole.
    assert "f32[7,16,8]" in text and "f32[7,16,16]" not in text, plan
    assert not any(f"f32[{n},8,16]" in text for n in range(1, 8)), plan
print("ok")
"""


@pytest.mark.slow
def test_sharded_parameters_and_carries_stay_sharded():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout == "ok\n", done.stderr
