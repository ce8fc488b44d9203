"""Stacks and chains under `vmap`, `shard_map`, named axes and Explicit meshes.

What runs on eight devices runs in one fresh process, since a process has its devices for good.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from tests.transforms.cases import relative_error

PLANS = ("none", "full", "dots", "uniform:2", "uniform:2+dots", "sqrt", "log", "binomial:3")
L, WIDTH = 8, 32
W = 0.1 * jax.random.normal(jax.random.key(0), (L, WIDTH, WIDTH))
X = jnp.linspace(-1, 1, 256 * WIDTH).reshape(256, WIDTH)


def block(x, w):
    return x + jnp.tanh(x @ w)


def stack(w, x, plan, block=block):
    return jaxckpt.scan_blocks(block, w, x, remat=plan)


def chain(w, x, plan, block=block):
    blocks = [lambda x, i=i: block(x, w[i]) for i in range(L)]
    return jaxckpt.chain(blocks, x, remat=plan)


@pytest.mark.heavy
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("run", [stack, chain])
def test_a_gradient_outside_vmap_keeps_none_for_each_example(run, plan):
    """It takes what it takes on the batch, and not a gradient of all weights for each example."""
    vmapped = lambda w: jax.vmap(lambda x: run(w, x, plan))(X).sum()
    batched = lambda w: run(w, X, plan).sum()
    assert relative_error(jax.grad(vmapped)(W), jax.grad(batched)(W)) <= 1e-6
    temps = [jaxckpt.measure(jax.grad(fn), W).temp_bytes for fn in (vmapped, batched)]
    assert temps[0] <= 1.3 * temps[1]
    # The twin: gradients of each example are what takes more, and they are right too.
    each = jax.vmap(jax.grad(lambda w, x: run(w, x, plan).sum()), (None, 0))
    assert jaxckpt.measure(each, W, X).peak_bytes > 256 * W.nbytes
    assert (
        relative_error(each(W, X[:3]).sum(0), jax.grad(lambda w: run(w, X[:3], plan).sum())(W))
        <= 1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_two_batches(plan):
    """Weights of a batch of their own, inside and outside; the batch stands where it stands."""

    def loss(plan):
        inner = jax.vmap(lambda w, x: stack(w, x, plan), (None, 1), 1)
        outer = jax.vmap(inner, (0, None))
        return lambda ws: jnp.sin(outer(ws, X[:5].T)).sum()

    ws = jnp.stack([W, -2 * W])
    assert relative_error(*(jax.jit(jax.grad(loss(p)))(ws) for p in (plan, "none"))) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_a_named_axis_in_the_block(plan):
    def mean(x, w):
        return x + jnp.tanh(jax.lax.pmean(x, "batch") @ w) * (1 + jax.lax.axis_index("batch"))

    def loss(plan):
        run = jax.vmap(lambda w, x: stack(w, x, plan, mean), (None, 0), axis_name="batch")
        return lambda w, x: jnp.sin(run(w, x)).sum()

    for wrap in (lambda fn: fn, jax.jit):
        got, want = (wrap(jax.grad(loss(p), (0, 1)))(W, X[:4]) for p in (plan, "none"))
        assert relative_error(got, want) <= 1e-6


EIGHT_DEVICES = """
import re, jax, jax.numpy as jnp, numpy as np, jaxckpt
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.transforms.test_many_axes import L, PLANS, W, WIDTH, X, block, chain, stack
assert len(jax.devices()) == 8
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
shard = lambda fn, out=P("d"): jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("d")), out_specs=out)
loss = lambda run: lambda w, x: jnp.sin(run(w, x)).sum()
gradients = lambda run: jax.jit(jax.grad(loss(run), (0, 1)))(W, X)

def check(name, got, want, bound=2e-5):
    for a, b in zip(map(np.asarray, got), map(np.asarray, want), strict=True):
        assert np.abs(a - b).max() <= bound * np.abs(b).max(), name

def mean(x, w):
    return x + jnp.tanh(jax.lax.pmean(x, "d") @ w)

def gather(x, w):
    return x + jnp.tanh(jax.lax.all_gather(x, "d").mean(0) @ w) * (1 + jax.lax.axis_index("d"))

plain = gradients(shard(lambda w, x: stack(w, x, "none")))
# Eight devices add up in another order than one.
check("none", plain, gradients(lambda w, x: stack(w, x, "none")), 1e-3)
for run in (stack, chain):
    for plan in PLANS:
        under = lambda w, x: run(w, x, plan)
        check((run, plan, "outside"), gradients(shard(under)), plain)
        inside = shard(jax.grad(loss(under), (0, 1)), (P(), P("d")))
        check((run, plan, "inside"), jax.jit(inside)(W, X), plain)
        check((run, plan, "eager"), jax.grad(loss(shard(under)), (0, 1))(W, X), plain)
for made in (mean, gather):
    want = gradients(shard(lambda w, x: stack(w, x, "none", made)))
    for plan in PLANS:
        check((made, plan), gradients(shard(lambda w, x: stack(w, x, plan, made))), want)

# Weights of each device's own, and an output that the loss does not read.
both = lambda c, w: (block(c[0], w), c[1] + c[0])
own = jnp.concatenate([W] * 8)
first = lambda plan: lambda w, x: jax.shard_map(
    lambda w, x: stack(w, (x, x), plan, both)[0], mesh=mesh, in_specs=(P("d"), P("d")),
    out_specs=P("d"))(w, x).sum()
want = jax.jit(jax.grad(first("none")))(own, X)
for plan in PLANS:
    check((plan, "own"), [jax.jit(jax.grad(first(plan)))(own, X)], [want])

explicit = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
put = lambda x, *spec: jax.device_put(x, NamedSharding(explicit, P(*spec)))
with jax.set_mesh(explicit):
    for run in (stack, chain):
        for plan in (*PLANS, "sqrt+offload:carry", "uniform:2+offload:carry"):
            got = jax.jit(jax.grad(loss(lambda w, x: run(w, x, plan)), (0, 1)))(put(W), put(X, "d"))
            check((run, plan, "explicit"), got, plain)
            assert got[1].sharding.spec[0] == "d", (run, plan, got[1].sharding)
            assert not any(got[0].sharding.spec), (run, plan, got[0].sharding)

# A batch over devices: of carries, and of weights alone.
rows, each = X.reshape(8, 32, WIDTH), jnp.stack([W, -W] * 4)
with jax.set_mesh(explicit):
    for run in (stack, chain):
        for axes, args in (
            ((None, 0), (put(W), put(rows, "d"))), ((0, None), (put(each, "d"), put(rows[0])))
        ):
            fn = lambda plan: loss(jax.vmap(lambda w, x: run(w, x, plan), axes))
            of = lambda plan: jax.jit(jax.grad(fn(plan), (0, 1)))(*args)
            got = of("sqrt")
            check((run, axes, "explicit vmap"), got, of("none"))
            for grad, arg in zip(got, args, strict=True):
                is_same = grad.sharding.is_equivalent_to(arg.sharding, arg.ndim)
                assert is_same, (run, axes, grad.sharding)

two = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
def constrained(x, w):
    return x + jax.lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(two, P(None, "m")))

want = gradients(lambda w, x: stack(w, x, "none"))
for run in (
    lambda w, x, plan: stack(w, x, plan, constrained),
    lambda w, x, plan: chain(w, x, plan, constrained),
):
    for plan, spmd_name in (("sqrt", None), ("sqrt", "d"), ("uniform:2", "d"), ("log", "d")):
        fn = jax.vmap(lambda w, x: run(w, x, plan), (None, 0), spmd_axis_name=spmd_name)
        fn = jax.jit(jax.grad(loss(fn), (0, 1)))
        text = fn.lower(W, rows).as_text()
        found = re.findall(r"sharding_constraint .*<@\\w+, \\[(\\{.*?\\}), .*>", text)
        assert set(found) == {'{"d"}' if spmd_name else "{?}"}, (run, plan, found)
        if spmd_name and plan != "log":
            where = (NamedSharding(two, P()), NamedSharding(two, P("d")))
            made = fn(*map(jax.device_put, (W, rows), where))
            check((run, plan), (made[0], made[1].reshape(X.shape)), want, 1e-3)
            assert made[1].sharding.spec[0] == "d", (run, plan, made[1].sharding)
print("ok")
"""


@pytest.mark.heavy
def test_shard_map_and_explicit_axes():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EIGHT_DEVICES],
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout == "ok\n", done.stderr
