"""The chunked loss and its gradients are those of Optax on all logits at once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxckpt.losses import chunks, linear_cross_entropy, plain_linear_cross_entropy
from tests.losses.cases import VOCAB, WIDTH, all_finite, gradients, inputs, pair
from tests.transforms.cases import relative_error

TOLERANCE = 1e-6


@st.composite
def problems(draw):
    """Any shape, layout and options that go together."""
    rows = draw(st.sampled_from([(), (1,), (2,), (2, 3)]))
    length = draw(st.sampled_from([1, 5, 6]))
    first = rows[0] if rows else length
    shards = draw(st.sampled_from([n for n in (1, 2, 3) if first % n == 0]))
    positions = length if rows else length // shards
    size = draw(st.sampled_from([n for n in (1, 2, 3, 5, 6) if positions % n == 0]))
    split_rows = int(np.prod(rows)) if rows else shards
    options = {
        "layout": draw(st.sampled_from(["DV", "VD"])),
        "reduction": draw(st.sampled_from(["mean", "sum"])),
        "z_loss": draw(st.sampled_from([0.0, 1e-2])),
        "ignore_index": draw(st.sampled_from([None, 0, 7])),
    }
    chunk_tokens = draw(st.sampled_from([None, split_rows * size]))
    dtype = draw(st.sampled_from(["int8", "uint8", "int32", "uint32"]))
    return (*rows, length), options, chunk_tokens, shards, dtype, draw(st.integers(0, 9))


@pytest.mark.slow
@settings(
    max_examples=8,
    derandomize=True,
)
@given(problems())
def test_all_options_together(problem):
    tokens, options, chunk_tokens, shards, dtype, seed = problem
    x, w, targets = inputs(tokens, layout=options["layout"], seed=seed)
    targets = targets.astype(dtype)
    if options["ignore_index"] is not None:
        targets = targets.at[..., ::2].set(options["ignore_index"])
    want = gradients(plain_linear_cross_entropy, x, w, targets, **options)
    options |= {"chunk_tokens": chunk_tokens, "token_shards": shards}
    got = gradients(linear_cross_entropy, x, w, targets, **options)
    assert relative_error(got, want) <= TOLERANCE
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 7, 12, 13])
def test_a_smaller_last_chunk(length, monkeypatch):
    monkeypatch.setattr(chunks, "_SMALL_BYTES", 0)
    x, w, targets = inputs((2, length))
    cut = chunks.choose_chunks(targets.shape, WIDTH, VOCAB, 1)
    assert cut.size == min(length, 4)
    got, want = pair(x, w, targets, z_loss=0.01)
    assert relative_error(got, want) <= TOLERANCE


@pytest.mark.slow
def test_cotangents_scale():
    x, w, targets = inputs()
    for factor in (3.0, -0.25, 0.0):
        scaled = lambda *args, factor=factor, **options: (
            factor * linear_cross_entropy(*args, chunk_tokens=8, **options)
        )
        got = gradients(scaled, x, w, targets)
        want = gradients(plain_linear_cross_entropy, x, w, targets)
        assert relative_error(got, jax.tree.map(lambda y, f=factor: f * y, want)) <= TOLERANCE


@pytest.mark.slow
def test_a_loss_between_layers():
    """The cotangent is a traced value, and x and w come from one another."""
    x, w, targets = inputs()

    def run(loss, v):
        return jnp.sin(loss(jnp.tanh(x * v[0]), w * v[1], targets) * v[2])

    v = jnp.array([0.5, 1.5, 0.7])
    got = jax.grad(lambda v: run(linear_cross_entropy, v))(v)
    assert relative_error(got, jax.grad(lambda v: run(plain_linear_cross_entropy, v))(v)) < 1e-5


@pytest.mark.slow
def test_accumulation_in_a_scan():
    """Parts of a batch with sums and counts give the mean over the counted tokens of all."""
    x, w, targets = inputs((4, 6))
    targets = targets.at[0, :5].set(3)

    def part(total, batch):
        run = lambda x, w: linear_cross_entropy(
            x, w, batch[1], chunk_tokens=2, ignore_index=3, reduction="sum", return_count=True
        )
        (loss, count), (grad_x, grad_w) = jax.value_and_grad(run, (0, 1), has_aux=True)(batch[0], w)
        return jax.tree.map(jnp.add, total, (loss, count, grad_w)), grad_x

    zero = (0.0, 0, jnp.zeros_like(w))
    (loss, count, grad_w), grad_x = jax.jit(lambda *batch: jax.lax.scan(part, zero, batch))(
        x.reshape(4, 1, 6, WIDTH), targets.reshape(4, 1, 6)
    )
    got = jax.tree.map(lambda y: y / count, (loss, (grad_x.reshape(x.shape), grad_w)))
    want = gradients(plain_linear_cross_entropy, x, w, targets, ignore_index=3)
    assert count == (targets != 3).sum()
    assert relative_error(got, want) <= TOLERANCE


@pytest.mark.slow
def test_under_vmap():
    x, w, targets = inputs()
    ws = jnp.stack([w, 2 * w, -w])
    run = lambda loss: jax.vmap(jax.value_and_grad(loss, (0, 1)), (None, 0, None))(x, ws, targets)
    chunked = lambda x, w, targets: linear_cross_entropy(x, w, targets, chunk_tokens=6)
    assert relative_error(run(chunked), run(plain_linear_cross_entropy)) <= TOLERANCE


@pytest.mark.slow
def test_all_ignored_is_zero():
    x, w, targets = inputs()
    for reduction in ("mean", "sum"):
        got, want = pair(x, w, targets * 0 + 9, 8, ignore_index=9, reduction=reduction)
        chex.assert_trees_all_equal(got, want)
        assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(got))
    # The twin: the same targets, counted.
    assert gradients(linear_cross_entropy, x, w, targets * 0 + 9)[0] > 0


@pytest.mark.parametrize("tokens", [(0, 4), (4, 0)])
def test_no_tokens_is_zero(tokens):
    x, w, targets = inputs(tokens)
    loss, (grad_x, grad_w) = gradients(linear_cross_entropy, x, w, targets)
    assert loss == 0 and not jnp.any(grad_w) and grad_x.shape == x.shape


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [-1, VOCAB, 120])
def test_a_target_that_does_not_exist_is_not_silent(wrong):
    x, w, targets = inputs()
    targets = targets.astype(jnp.int8).at[1, 3].set(wrong)
    for tree in pair(x, w, targets, 8):
        assert jnp.isnan(tree[0]) and jnp.isnan(tree[1][1]).all()
    assert all_finite(pair(x, w, targets, 8, ignore_index=wrong))


@pytest.mark.slow
def test_bf16_is_as_near_to_float32_as_the_plain_version():
    """Against float32 on the same inputs: each gradient is off by less than its last bit.

    Measured: 3.0e-3 and 1.5e-3 for `x` and `w`, 2.5e-3 and 1.3e-3 by the plain version, which
    multiplies a float32 gradient of the logits where this one rounds it to bfloat16.
    """
    x, w, targets = inputs((4, 64), dtype="bfloat16")
    widen = lambda tree: jax.tree.map(lambda y: y.astype(jnp.float32), tree)
    truth = gradients(plain_linear_cross_entropy, *widen((x, w)), targets)
    got, plain = pair(x, w, targets, 32)
    assert [y.dtype for y in jax.tree.leaves(got)] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    assert relative_error(got[0], truth[0]) < 1e-6
    got, plain = widen(got), widen(plain)
    for mine, other, true in zip(got[1], plain[1], truth[1], strict=True):
        assert 0 < relative_error(mine, true) < min(1.5 * relative_error(other, true), 2**-8)


def test_float32_weights_under_a_bf16_computation_keep_float32_gradients():
    x, w, targets = inputs((4, 64))
    x = x.astype(jnp.bfloat16)
    kernel = w.astype(jnp.bfloat16)
    kept = gradients(linear_cross_entropy, x, w, targets, chunk_tokens=32)[1][1]
    rounded = gradients(linear_cross_entropy, x, kernel, targets, chunk_tokens=32)[1][1]
    assert kept.dtype == jnp.float32
    chex.assert_trees_all_equal(kept.astype(jnp.bfloat16), rounded)
    assert relative_error(kept, rounded.astype(jnp.float32)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_inside_shard_map(chunk_tokens):
    """Its sums vary over the mesh as the tokens do; weights that do not get a summed gradient."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    x = jax.random.normal(jax.random.key(0), (2, 8, 4))
    w = jax.random.normal(jax.random.key(1), (4, 16))
    y = jnp.arange(16).reshape(2, 8)

    def sharded(x, w):
        head = lambda x, w, y: jax.lax.pmean(
            linear_cross_entropy(x, w, y, chunk_tokens=chunk_tokens), "d"
        )
        specs = (P("d"), P(), P("d"))
        return jax.shard_map(head, mesh=mesh, in_specs=specs, out_specs=P())(x, w, y)

    plain = lambda x, w: plain_linear_cross_entropy(x, w, y)
    got, want = (jax.value_and_grad(loss, (0, 1))(x, w) for loss in (sharded, plain))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.allclose(a, b, atol=1e-6)
