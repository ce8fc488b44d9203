"""Residuals of a segment lie in one order on a GPU, so that no loop transposes the whole stack."""

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.absent import launch
from jaxckpt.models.attention import causal_attention
from jaxckpt.targets.target import parse_target
from jaxckpt.transforms.rows import row_major

BLOCKS, BATCH, SEQ, HEADS, SIZE = 8, 8, 256, 4, 64


def block(x, w):
    """Attention made of matmuls, whose operands XLA for GPUs wants transposed."""
    q, k, v = (jnp.tanh(x @ w[i]).reshape(BATCH, SEQ, HEADS, SIZE) for i in range(3))
    return x + causal_attention(q, k, v).reshape(x.shape)


def gradients(plan, **options):
    stack = lambda w, x: jaxckpt.scan_blocks(block, w, x, remat=plan, **options)
    return jax.grad(lambda w, x: stack(w, x).astype(jnp.float32).sum(), argnums=(0, 1))


SHAPES = (
    jax.ShapeDtypeStruct((BLOCKS, 3, HEADS * SIZE, HEADS * SIZE), jnp.bfloat16),
    jax.ShapeDtypeStruct((BATCH, SEQ, HEADS * SIZE), jnp.bfloat16),
)


@pytest.mark.parametrize("platform, pinned", [("cuda", True), ("cpu", False), ("tpu", False)])
def test_rows_are_pinned_on_gpus_alone(platform, pinned):
    traced = jax.jit(gradients("uniform:2")).trace(*SHAPES)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("LayoutConstraint" in text) == pinned


def test_values_are_untouched():
    keys = jax.random.split(jax.random.key(0), 3)
    leaves = [jnp.arange(24.0).reshape(2, 3, 4), jnp.ones([3], jnp.int32), keys]
    out = jax.jit(row_major)(leaves)
    assert [x.shape for x in out] == [x.shape for x in leaves]
    assert (out[0] == leaves[0]).all() and (out[2] == keys).all()


def test_no_second_copy_of_a_segment_on_an_absent_gpu():
    try:
        launch.check_available(parse_target("h100"))
    except launch.Unavailable as error:
        pytest.skip(str(error))
    temp = lambda **options: (
        jaxckpt.measure(gradients("uniform:2", **options), *SHAPES, target="h100").temp_bytes
    )
    assert temp() <= temp(nested=True)
