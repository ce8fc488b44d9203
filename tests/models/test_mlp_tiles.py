"""The Transformer's MLP in tiles: the same loss and gradients, run exactly twice in all."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.costs.flops import count_flops
from jaxckpt.models import Transformer, TransformerConfig
from tests.transforms.cases import relative_error

SIZES = {"num_blocks": 3, "d_model": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
TOKENS = jnp.arange(20).reshape(2, 10)


def gradients(tiles: int, remat="full", d_ff=32):
    config = TransformerConfig(**SIZES, d_ff=d_ff, dtype="float32", mlp_tiles=tiles)
    model = Transformer(config, remat=remat)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    loss = lambda params: jnp.square(model.apply({"params": params}, TOKENS)).mean()
    return jax.value_and_grad(loss), params


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", pytest.param("log", marks=pytest.mark.slow)])
def test_loss_and_gradients_are_the_same(remat):
    whole, params = gradients(1, remat)
    tiles, same = gradients(3, remat)  # 10 positions: 4, 4 and 2
    assert relative_error(same, params) == 0
    assert relative_error(jax.jit(tiles)(params), jax.jit(whole)(params)) < 1e-5


@pytest.mark.slow
def test_the_mlp_runs_twice_in_all():
    """By the products that a wider MLP adds: forward 3, then forward 3 and reversal 6 of a tile.

    The twin: whole, the last product is not run again.
    """

    def products(tiles, remat):
        flops = [
            count_flops(jax.make_jaxpr(fn)(params))
            for fn, params in (gradients(tiles, remat, d_ff) for d_ff in (32, 64))
        ]
        return (flops[1] - flops[0]) / (2 * TOKENS.size * 16 * 32 * 3)

    assert products(2, "full") == products(3, "full") == 11
    assert products(1, "full") == 11
    assert products(1, "none") == 9


@pytest.mark.heavy
def test_the_working_set_on_an_absent_tpu():
    """At long rows the hidden values of an MLP are most of a checkpointed block's working set."""

    def step(tiles):
        config = TransformerConfig(
            **SIZES | {"d_model": 256, "head_dim": 128},
            d_ff=2048,
            vocab_size=256,
            dtype="bfloat16",
            attention="splash",
            mlp_tiles=tiles,
        )
        model = Transformer(config, remat="full")
        tokens = jax.ShapeDtypeStruct((1, 8192), "int32")
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

        def loss(params, tokens):
            x = model.apply({"params": params}, tokens, method="features")
            return jnp.square(x.astype(jnp.float32)).mean()

        return jax.grad(loss), params, tokens

    peak = lambda tiles: jaxckpt.measure(*step(tiles), target="v5e-1").temp_bytes
    peak = functools.cache(peak)
    hidden = 8192 * 2048 * 2
    assert peak(1) - peak(8) > 2 * hidden
