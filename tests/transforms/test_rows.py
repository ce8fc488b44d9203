"""Unrolled blocks read their parameters when they run: no copy waits for the backward pass."""

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from experiments.config import TrainConfig
from experiments.training.build import build
from jaxckpt.absent import launch
from jaxckpt.memory.worker import get_topology, measure_built
from jaxckpt.models.config import TransformerConfig
from jaxckpt.targets.target import parse_target
from jaxckpt.transforms import block_vjp, rows
from tests.transforms.cases import relative_error

BLOCKS, WIDTH = 8, 512
SHAPES = (
    jax.ShapeDtypeStruct((BLOCKS, WIDTH, WIDTH), jnp.float32),
    jax.ShapeDtypeStruct((16, WIDTH), jnp.bfloat16),
)
WEIGHTS = 4 * BLOCKS * WIDTH**2


def block(x, w):
    return x + jnp.tanh(x @ w.astype(jnp.bfloat16))


def loss(w, x, remat="full"):
    y = jaxckpt.scan_blocks(block, w, x, remat=remat, unroll=BLOCKS)
    return y.astype(jnp.float32).sum()


def temp_bytes(target="local", remat="full"):
    # A function of its own, so that nothing is found in another's cache.
    grad = jax.grad(lambda *args: loss(*args, remat=remat))
    return jaxckpt.measure(grad, *SHAPES, target=target).temp_bytes


def skip_without(target):
    if target != "local":
        try:
            launch.check_available(parse_target(target))
        except launch.Unavailable as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("target", ["local", "h100"])
def test_rows_do_not_wait_for_the_backward_pass(target, monkeypatch):
    skip_without(target)
    inside = temp_bytes(target)
    monkeypatch.setattr(rows, "read_inside", lambda apply, items, *_: (apply, items))
    assert inside < temp_bytes(target) - 0.4 * WEIGHTS


@pytest.mark.slow
@pytest.mark.parametrize("form", [lambda w: w.T, lambda w: w.astype(jnp.bfloat16).T])
def test_recorded_blocks_keep_no_form_of_a_weight(form, monkeypatch):
    def both(x, w):
        return x + jnp.square(jax.nn.relu(x @ w)) @ form(w).astype(x.dtype)

    def gradient(w, x, remat="uniform:2"):
        return jax.grad(lambda w: jaxckpt.scan_blocks(both, w, x, remat=remat).sum())(w)

    few = jax.ShapeDtypeStruct((16, WIDTH), jnp.float32)
    temp = jaxckpt.measure(lambda *args: gradient(*args), SHAPES[0], few).temp_bytes
    w = jax.random.normal(jax.random.key(0), (4, 8, 8))
    x = jax.random.normal(jax.random.key(1), (4, 8))
    assert relative_error(gradient(w, x), gradient(w, x, "none")) <= 1e-5
    monkeypatch.setattr(block_vjp, "_made_again", lambda *_: None)
    kept = jaxckpt.measure(lambda *args: gradient(*args), SHAPES[0], few).temp_bytes
    half = WEIGHTS // 2  # of a segment's blocks
    assert temp < kept - 0.4 * half


def test_recorded_blocks_keep_no_constant():
    """A `relu`'s zeros are none of a block's own values: of its residuals nothing is that size."""
    record = lambda c, p, _: [jax.nn.relu(c[0] + p[0])]
    groups = [[jnp.ones([4, 8])], [jnp.ones(8)], []]
    found = block_vjp.Recorder.trace(record, *groups, block_vjp.Moving.all_of(*groups[1:]))
    out, kept = found.record(*groups)
    assert [leaf.dtype for leaf in kept] == [bool]
    reverse = found.reverse(kept, *groups[1:])
    grads = jax.tree.leaves(reverse([jnp.ones([4, 8])]))
    assert [leaf.shape for leaf in grads] == [(4, 8), (8,)] and float(grads[1].sum()) == 32.0
    assert float(out[0].sum()) == 64.0


@pytest.mark.heavy
def test_a_second_stage_copies_no_parameters(monkeypatch):
    """Its blocks read the whole stack, not a part cut out of it, in a step that trains."""
    skip_without("h100")
    target = parse_target("h100")
    shape = {"num_blocks": 8, "d_model": 256, "d_ff": 768, "num_heads": 2, "num_kv_heads": 2}
    model = TransformerConfig(**shape, head_dim=128, vocab_size=256)

    def temp_bytes(remat):
        config = TrainConfig(model=model, remat=remat, batch_size=1, seq_len=64)
        return measure_built(build(config, "h100"), target, get_topology(target)).temp_bytes

    one, two = temp_bytes("full"), temp_bytes("3xfull/full+names:q")
    assert two < 1.05 * one
    read = rows.read_inside
    monkeypatch.setattr(rows, "read_inside", lambda apply, items, *_: read(apply, items, items, 0))
    assert temp_bytes("3xfull/full+names:k") > 1.5 * one


@pytest.mark.slow
def test_gradients_and_tangents_are_those_of_a_loop():
    keys = jax.random.split(jax.random.key(0), 2)
    w = 0.05 * jax.random.normal(keys[0], (BLOCKS, 16, 16))
    params = {"w": w, "key": jax.random.split(keys[1], BLOCKS), "index": jnp.arange(BLOCKS)}

    def block(x, p):
        noise = jax.random.normal(p["key"], x.shape)
        return jnp.tanh(x @ p["w"] + noise) * (1 + p["index"])

    def run(w, unroll, remat="full"):
        x = jnp.linspace(-1, 1, 64).reshape(4, 16)
        y = jaxckpt.scan_blocks(block, params | {"w": w}, x, remat=remat, unroll=unroll)
        return (y**2).sum()

    for other in (
        (3, "full"),
        (BLOCKS, "full"),
        (BLOCKS, "3xfull+dots/full"),
        (BLOCKS, "3xnone/full"),
    ):
        reverse = [jax.grad(run)(w, *n) for n in ((1,), other)]
        assert jnp.allclose(*reverse, rtol=1e-5) and jnp.abs(reverse[0]).max() > 0
        forward = [jax.jvp(lambda w, n=n: run(w, *n), (w,), (w,))[1] for n in ((1,), other)]
        assert jnp.allclose(*forward, rtol=1e-5)


@pytest.mark.parametrize(
    "remat, unroll, inside",
    [("full", 8, True), ("4xfull+dots/full", 8, True), ("full", 1, False), ("none", 8, False)],
)
def test_which_stacks_read_inside(remat, unroll, inside):
    assert rows.reads_inside(remat, unroll) == inside
