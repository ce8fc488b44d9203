"""The roofline estimate: bytes of fused groups counted by hand, loops, the host, plans in order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxckpt
from jaxckpt.costs import roofline
from jaxckpt.costs.flat import flatten
from jaxckpt.costs.flops import count_flops
from jaxckpt.costs.fusion import traffic
from jaxckpt.costs.roofline import Rates, estimate
from jaxckpt.models import Transformer, TransformerConfig
from jaxckpt.targets.chips import CHIPS
from tests.memory.kernels import causal, trace_cudnn

# One float32 array of these tests is 1 MiB.
X = jax.ShapeDtypeStruct((512, 512), jnp.float32)
MIB = 1 << 20
H100 = Rates(flops_per_second=790e12, bytes_per_second=3e12)


def moved(fn, *args, stacked: int = 0) -> float:
    """Returns the bytes of `fn` outside of kernels, in arrays of 1 MiB."""
    return traffic(flatten(jax.make_jaxpr(fn)(*args)), stacked).memory_bytes / MIB


def test_an_elementwise_chain_reads_its_inputs_and_writes_its_output():
    assert moved(lambda x: jnp.sin(x), X) == 2
    assert moved(lambda x: jnp.exp(jnp.sin(x) * 2 + 1).T, X) == 2
    assert moved(lambda x, y: jnp.sin(x) * y + x, X, X) == 3
    # A jitted part, a checkpoint or a custom derivative is no border.
    assert moved(lambda x, y: jax.jit(jnp.sin)(x) * jax.nn.silu(y), X, X) == 3


def test_a_second_output_is_written_once():
    def both(x):
        y = jnp.sin(x)
        return y, jnp.cos(y)

    assert moved(both, X) == 3


def test_a_product_ends_a_group():
    # cos is written for the product, whose output is read by the sine.
    assert moved(lambda x, w: jnp.sin(jnp.cos(x) @ w), X, X) == 2 + 2
    assert moved(lambda x, w: x.T @ w, X, X) == 0
    product = lambda x, w: x @ w
    kernels = traffic(flatten(jax.make_jaxpr(product)(X, X))).kernel_bytes
    assert list(kernels.values()) == [3 * MIB]


def test_a_reduction_reads_its_producers_inputs():
    row = 512 * 4 / MIB
    assert moved(lambda x: jnp.sin(x).sum(axis=1), X) == 1 + row
    # Softmax: the maximum, the sum of exponentials, the quotient; each reads x again.
    assert moved(functools.partial(jax.nn.softmax, axis=1), X) == pytest.approx(4, abs=0.05)


def test_what_is_cheap_is_made_again():
    half = jax.ShapeDtypeStruct(X.shape, jnp.bfloat16)

    def norm(x):  # as a float32 norm of a bfloat16 stream: both passes read bfloat16
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt((wide**2).mean(axis=1, keepdims=True))).astype(x.dtype)

    assert moved(norm, half) == pytest.approx(3 / 2, abs=0.02)
    mask = lambda x: jnp.where(jnp.arange(512)[:, None] >= jnp.arange(512)[None], x, 0)
    assert moved(mask, X) == 2
    assert moved(lambda x: jnp.zeros_like(x) + x, X) == 2


def test_slices_and_updates_move_their_part():
    part = 8 / 512
    assert moved(lambda x: jax.lax.dynamic_slice_in_dim(x, 3, 8) * 2, X) == 2 * part
    rows = jax.ShapeDtypeStruct((8, 512), jnp.float32)
    update = lambda x, rows: jax.lax.dynamic_update_slice_in_dim(x, rows, 3, 0)
    assert moved(update, X, rows) == 2 * part
    gather = lambda x: x[jnp.array([1, 5])]
    assert moved(gather, X) == pytest.approx(2 * 2 / 512, rel=0.05)


def test_a_chain_longer_than_pythons_stack():
    def chain(x):
        for _ in range(1500):
            x = x + jnp.sin(x)
        return x

    assert moved(chain, X) == 2


def test_dead_steps_cost_nothing():
    def dead(x):
        _ = jnp.sort(jnp.cos(x))
        return jnp.sin(x)

    assert moved(dead, X) == 2
    assert moved(lambda x: jnp.sort(x), X) == 2


def test_rows_of_a_loops_output():
    """A fused group writes a row in place; what else needs it, or a kernel made it, is copied."""
    assert moved(lambda x: jnp.sin(x), X, stacked=1) == 2
    assert moved(lambda x, w: x @ w, X, X, stacked=1) == 2
    both = lambda x, w: (jnp.sin(x) @ w, jnp.sin(x))
    assert moved(both, X, X, stacked=1) == 2 + 2
    assert moved(lambda x: (jnp.sin(x), x), X, stacked=1) == 2 + 2


def test_seconds_are_those_of_the_longer_bound():
    rates = Rates(flops_per_second=1e12, bytes_per_second=1e15)
    found = estimate(jax.make_jaxpr(jnp.matmul)(X, X), rates)
    assert found.flops == 2 * 512**3
    assert found.seconds == pytest.approx(2 * 512**3 / 1e12 / roofline.MATMUL_EFFICIENCY)
    rates = Rates(flops_per_second=1e18, bytes_per_second=1e9)
    found = estimate(jax.make_jaxpr(jnp.matmul)(X, X), rates)
    assert found.matmul_seconds == pytest.approx(3 * MIB / 1e9 / roofline.BYTES_EFFICIENCY)
    assert found.bytes_moved == 3 * MIB and found.memory_seconds == 0


def test_loops_count_their_trips_and_conds_their_slowest_branch():
    once = estimate(jax.make_jaxpr(lambda x, w: jnp.sin(x @ w))(X, X), H100)
    loop = lambda x, w: jax.lax.fori_loop(0, 7, lambda _, x: jnp.sin(x @ w), x)
    found = estimate(jax.make_jaxpr(loop)(X, X), H100)
    assert found.flops == 7 * once.flops
    assert found.seconds == pytest.approx(7 * once.seconds, rel=1e-3)
    branches = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: jnp.sin(x @ w), x)
    found = estimate(jax.make_jaxpr(branches)(X, X), H100)
    assert found.flops == once.flops
    assert found.seconds == pytest.approx(once.seconds, rel=1e-3)


def test_the_host_link_beside_the_computation_or_after_it():
    def stack(x, w):
        block = lambda x, w: jnp.sin(jaxckpt.tag(x @ w, "h"))
        return jaxckpt.scan_blocks(block, w, x, remat="offload:h").sum()

    w = jax.ShapeDtypeStruct((4, 512, 512), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.grad(stack))(X, w)
    rates = lambda host: Rates(
        flops_per_second=1e12, bytes_per_second=1e12, host_bytes_per_second=host
    )
    fast, slow = estimate(jaxpr, rates(1e15)), estimate(jaxpr, rates(1e8))
    assert fast.host_seconds == pytest.approx(2 * 4 * MIB / 1e15), "there and back, each block"
    assert fast.seconds == fast.matmul_seconds + fast.memory_seconds
    assert slow.seconds == slow.host_seconds == pytest.approx(2 * 4 * MIB / 1e8)
    after = estimate(jaxpr, dataclasses.replace(rates(1e8), host_overlaps=False))
    assert after.seconds == pytest.approx(slow.host_seconds + fast.seconds)
    plain = jax.make_jaxpr(jax.grad(lambda x, w: jnp.sin(x @ w[0]).sum()))(X, w)
    assert estimate(plain, rates(1e8)).host_seconds == 0


def whole_loss(logits, tokens):
    """Returns the loss of all logits at once, as the measured steps computed it."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


@functools.cache
def step(plan: str):
    """Returns the jaxpr of a Transformer's loss and gradients; 64 blocks, so that log < sqrt."""
    config = TransformerConfig(
        vocab_size=64, num_blocks=64, d_model=256, head_dim=64, d_ff=1024, dtype="bf16"
    )
    model = Transformer(config, remat=plan)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    loss = lambda params, tokens: whole_loss(model.apply(params, tokens), tokens)
    return jax.make_jaxpr(jax.value_and_grad(loss))(params, tokens)


# An H100's arithmetic, with memory so fast that small shapes are bound by arithmetic too.
COMPUTE_BOUND = Rates(flops_per_second=790e12, bytes_per_second=1e15)


def test_plans_come_in_the_order_of_their_recomputation():
    seconds = [
        estimate(step(plan), COMPUTE_BOUND).seconds
        for plan in ("none", "dots", "full", "sqrt", "log")
    ]
    none, dots, full, sqrt, log = seconds
    assert abs(dots / none - 1) < 0.05, "dots recomputes no product"
    assert max(none, dots) < full < sqrt < log
    # A backward pass is twice a forward pass, so a forward pass more is a third more.
    assert 1.2 < full / none < 1.4
    assert full < 0.9 * sqrt < 0.9 * log


def test_recomputing_can_move_fewer_bytes_than_keeping():
    """A loop copies the residuals it keeps, so in one `full` spends less time on memory."""
    full, none = estimate(step("full"), H100), estimate(step("none"), H100)
    assert full.memory_seconds < 0.98 * none.memory_seconds
    assert full.flops > none.flops


def test_an_estimate_is_deterministic_and_agrees_with_the_flop_count():
    first, second = (estimate(step("sqrt"), H100) for _ in range(2))
    step.cache_clear()
    assert first == second == estimate(step("sqrt"), H100)
    assert first.flops == count_flops(step("sqrt"))


def test_attention_reaches_less_on_short_sequences(monkeypatch):
    trace_cudnn(monkeypatch)

    def rate(size: int) -> float:
        q = jax.ShapeDtypeStruct((1, size, 16, 128), jnp.bfloat16)
        found = estimate(jax.make_jaxpr(causal)(q, q, q), COMPUTE_BOUND)
        return found.flops / found.seconds / 790e12

    assert rate(1024) == pytest.approx(0.35, abs=0.02)
    assert rate(16384) == pytest.approx(0.68, abs=0.02)


# Measured on one H200: Qwen3-0.6B's shape, AdamW in float32, cuDNN attention, one block a trip of a
# loop; at 1024 tokens with whole logits. Attention's efficiency is fitted to such steps, so this
# test holds the rest of the model and says nothing of other chips. `none` is not among them: the
# step that was measured kept float32 residuals of norms, which the model has no more.
MEASURED_MS = {
    (8, 1024, "full"): 99.6,
    (8, 1024, "dots_no_batch"): 94.1,
    (2, 16384, "full"): 770,
    (2, 16384, "attention"): 676,
    (2, 16384, "names:q,k,v,mid,gate,up"): 754,
}


@pytest.mark.slow
@pytest.mark.parametrize("batch, size, plan", MEASURED_MS)
def test_estimates_of_measured_steps(batch, size, plan, monkeypatch):
    trace_cudnn(monkeypatch)
    config = TransformerConfig(
        vocab_size=151936,
        num_blocks=28,
        d_model=1024,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        d_ff=3072,
        dtype="bf16",
        attention="cudnn",
    )
    model, optimizer = Transformer(config, remat=plan), optax.adamw(1e-4)

    def train(params, state, tokens):
        loss = lambda params: whole_loss(model.apply(params, tokens), tokens)
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    tokens = jax.ShapeDtypeStruct((batch, size), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    jaxpr = jax.make_jaxpr(train)(params, jax.eval_shape(optimizer.init, params), tokens)
    found = estimate(jaxpr, Rates(flops_per_second=790e12, bytes_per_second=4.3e12))
    assert 1e3 * found.seconds == pytest.approx(MEASURED_MS[batch, size, plan], rel=0.15)


def test_random_bits_take_longer_than_writing_them():
    seconds = lambda fn: estimate(jax.make_jaxpr(fn)(), H100).seconds
    draw = lambda impl: jax.random.bits(jax.random.key(0, impl=impl), (1 << 20,))
    threefry, hardware = (seconds(lambda impl=impl: draw(impl)) for impl in ("threefry2x32", "rbg"))
    assert threefry == pytest.approx(3 * hardware, rel=0.01)


def test_collectives_are_as_slow_as_their_links():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def seconds(fn):
        run = jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return estimate(jax.make_jaxpr(run)(jnp.ones(1 << 20)), H100).seconds

    reduce, permute = (
        lambda x: jax.lax.psum(x, "x"),
        lambda x: jax.lax.ppermute(x, "x", [(0, 0)]),
    )
    once = seconds(lambda x: -x)  # reads and writes
    assert seconds(permute) == pytest.approx((1 + 10 / 2) * once)
    assert seconds(reduce) == pytest.approx((1 + 20 / 2) * once)


def test_rates():
    sold = Rates.of_data_sheet(
        flops_per_second=989e12, bytes_per_second=4.8e12, host_bytes_per_second=50e9
    )
    assert sold.flops_per_second == pytest.approx(790e12, rel=0.01)
    assert sold.bytes_per_second == pytest.approx(4.3e12, rel=0.01)
    # As timed: a GPU waits for its copies.
    assert not Rates.of_chip(CHIPS["h100"]).times(8).host_overlaps
    assert Rates.of_chip(CHIPS["v5e"]).host_overlaps
    with pytest.raises(ValueError, match=r"bytes_per_second is 0; a rate is above 0"):
        Rates(flops_per_second=1.0, bytes_per_second=0)
