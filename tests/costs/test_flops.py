"""FLOPs of kernels, counted from their shapes; those of loops and calls are in test_measure.py."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxckpt.costs.flops import count_flops
from tests.memory.kernels import attention, causal, trace_cudnn

BATCH, SIZE, HEADS, KV_HEADS, HEAD_DIM = 2, 256, 4, 2, 64
PRODUCT = 2 * BATCH * HEADS * SIZE * SIZE * HEAD_DIM  # q k^T, every pair of positions


@pytest.fixture
def cudnn(monkeypatch):
    trace_cudnn(monkeypatch)


def traced(fn, *shapes, grad: bool = False, masked: bool = False):
    """Returns the FLOPs of a bfloat16 function, or of its value and its gradient."""
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    scalar = lambda *args: fn(*args).astype(jnp.float32).sum()
    run = jax.value_and_grad(scalar, argnums=tuple(range(len(args)))) if grad else fn
    return count_flops(jax.make_jaxpr(run)(*args), masked=masked)


SHAPES = ((BATCH, SIZE, HEADS, HEAD_DIM), *[(BATCH, SIZE, KV_HEADS, HEAD_DIM)] * 2)


def test_cudnn_attention_counts_what_its_kernel_runs(cudnn):
    assert traced(attention, *SHAPES) == 2 * PRODUCT
    assert traced(causal, *SHAPES) == PRODUCT
    # Backward, five products: the scores again, the gradients of p, v, q and k.
    assert traced(attention, *SHAPES, grad=True) == (2 + 5) * PRODUCT
    assert traced(causal, *SHAPES, grad=True) == (2 + 5) * PRODUCT // 2
    assert traced(jax.checkpoint(causal), *SHAPES, grad=True) == (2 + 2 + 5) * PRODUCT // 2


def test_what_a_mask_hides_counts_where_it_is_asked_for(cudnn):
    window = functools.partial(causal, local_window_size=(15, 0))
    for one in (attention, causal, window):
        assert traced(one, *SHAPES, masked=True) == 2 * PRODUCT
        assert traced(one, *SHAPES, grad=True, masked=True) == (2 + 5) * PRODUCT
    in_loop = lambda q, k, v: jax.lax.fori_loop(0, 3, lambda _, q: causal(q, k, v), q)
    assert traced(in_loop, *SHAPES, masked=True) == 3 * 2 * PRODUCT


def test_cudnn_attention_with_a_window_counts_the_window(cudnn):
    window = functools.partial(causal, local_window_size=(15, 0))
    assert traced(window, *SHAPES) == 2 * PRODUCT * 16 // SIZE


def test_cudnn_attention_against_other_keys(cudnn):
    longer = ((BATCH, SIZE, HEADS, HEAD_DIM), *[(BATCH, 2 * SIZE, HEADS, HEAD_DIM)] * 2)
    assert traced(attention, *longer) == 2 * 2 * PRODUCT


def test_the_plain_attention_counts_its_matmuls():
    """The twin: the same shapes without a kernel, whose products mask nothing away."""
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    assert traced(plain, *SHAPES) == 2 * PRODUCT


def splash(mask, size: int = 1024, heads: int = 2):
    kernels = pytest.importorskip(
        "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel"
    )
    masks = pytest.importorskip(
        "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask"
    )
    masks = masks.MultiHeadMask([getattr(masks, mask)((size, size)) for _ in range(heads)])
    return kernels.make_splash_mha(masks, head_shards=1, q_seq_shards=1)


def test_splash_attention_counts_the_blocks_that_its_mask_leaves():
    shapes = ((2, 1024, 128),) * 3
    product = 2 * 2 * 1024 * 1024 * 128
    full, lower = splash("FullMask"), splash("CausalMask")
    assert traced(full, *shapes) == 2 * product
    # Blocks of 128: 36 of 8 x 8 touch the lower triangle.
    assert traced(lower, *shapes) == 2 * product * 36 // 64
    assert traced(jax.jit(lower), *shapes) == 2 * product * 36 // 64
    assert traced(lower, *shapes, masked=True) == traced(full, *shapes)
    in_loop = lambda q, k, v: jax.lax.fori_loop(
        0, 3, lambda _, q: lower(q, k, v).astype(q.dtype), q
    )
    assert traced(in_loop, *shapes) == 3 * traced(lower, *shapes)
    ratio = traced(lower, *shapes, grad=True) / traced(full, *shapes, grad=True)
    assert abs(ratio - 36 / 64) < 0.01


def matmul_kernel(**options):
    from jax.experimental import pallas as pl

    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    rows = pl.BlockSpec((16, 32), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[rows, pl.BlockSpec((32, 32), lambda i: (0, 0))],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct((64, 32), jnp.bfloat16),
        **options,
    )


def test_a_pallas_kernel_counts_its_grid_or_what_it_says():
    from jax.experimental import pallas as pl

    shapes = (64, 32), (32, 32)
    assert traced(matmul_kernel(), *shapes) == 2 * 64 * 32 * 32
    estimate = pl.CostEstimate(flops=12345, transcendentals=0, bytes_accessed=1)
    assert traced(matmul_kernel(cost_estimate=estimate), *shapes) == 12345


def test_ragged_dot_counts_every_row_once():
    groups = jnp.array([2, 3, 3])
    fn = lambda x, w: jax.lax.ragged_dot(x, w, groups)
    product = 2 * 8 * 16 * 5
    assert traced(fn, (8, 16), (3, 16, 5)) == product
    assert traced(fn, (8, 16), (3, 16, 5), grad=True) == 3 * product


def test_custom_derivatives_and_checkpoints_are_followed():
    @jax.custom_vjp
    def double(x):
        return x @ x

    double.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x @ x,))
    product = 2 * 8 * 8 * 8
    assert traced(double, (8, 8)) == product
    assert traced(double, (8, 8), grad=True) == 3 * product
    again = jax.checkpoint(lambda x: jnp.sin(x @ x))
    assert traced(again, (8, 8), grad=True) == 4 * product


def test_a_map_over_devices_counts_all_of_them():
    mesh = jax.sharding.AbstractMesh((4,), ("x",))
    spec = jax.sharding.PartitionSpec("x")
    spread = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(spec, None), out_specs=spec)
    a, b = jnp.ones([8, 16]), jnp.ones([16, 32])
    assert count_flops(jax.make_jaxpr(spread)(a, b)) == 2 * 8 * 16 * 32
