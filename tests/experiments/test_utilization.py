"""MFU is what the model needs, by hand; HFU adds what a plan or a kernel runs again."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments.config import TrainConfig
from experiments.training.build import build
from experiments.training.step import init_state
from experiments.training.utilization import StepFlops, model_flops, step_flops
from jaxckpt.costs.flops import count_flops
from jaxckpt.models import TransformerConfig

MODEL = TransformerConfig(
    **{"num_blocks": 3, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
    **{"d_ff": 96, "vocab_size": 320, "dtype": "bf16", "attention": "plain"},
)
CONFIG = TrainConfig(model=MODEL, batch_size=2, remat="none", loss_chunk_tokens=64)
# Parameters of one block's matrix products: queries and output, keys and values, the MLP's three.
BLOCK = 2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 96
HEAD = 64 * 320
LENGTHS = [32, 128, 512]


def flops_of(**changes) -> StepFlops:
    config = dataclasses.replace(CONFIG, **changes)
    return step_flops(config, build(config, "local"))


def by_hand(length: int) -> int:
    """PaLM's 6 N + 12 L H Q T a token."""
    return 2 * length * (6 * (3 * BLOCK + HEAD) + 12 * 3 * 4 * 32 * length)


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
def test_what_the_model_needs_is_the_papers_count(length):
    assert flops_of(seq_len=length).model == by_hand(length)
    # An embedding that is no head is looked up, not multiplied.
    untied = dataclasses.replace(MODEL, tied_embeddings=False)
    assert flops_of(seq_len=length, model=untied).model == by_hand(length)


@pytest.mark.parametrize("length", LENGTHS)
def test_what_is_run_again_is_no_need(length):
    none, full = flops_of(seq_len=length), flops_of(seq_len=length, remat="full")
    assert none.model == full.model
    # Every block's forward, but for its last product, which nothing needs.
    again = 2 * length * 3 * (2 * (BLOCK - 64 * 96) + 4 * 4 * 32 * length)
    assert full.hardware - none.hardware == again
    # Plain attention makes the scores again in its backward pass; little else is run.
    scores = 2 * length * 3 * 2 * 4 * 32 * length
    assert scores <= none.hardware - none.model <= 1.1 * scores


def test_what_is_frozen_has_no_gradient():
    config = dataclasses.replace(CONFIG, seq_len=32, trainable=("layers/mlp/*",))
    params = jax.eval_shape(lambda: init_state(config)).params
    frozen = 3 * (BLOCK - 3 * 64 * 96) + HEAD
    assert model_flops(config, params) == by_hand(32) - 2 * 32 * 2 * frozen


def test_shares_of_the_peak():
    flops = StepFlops(model=200, hardware=300)
    assert flops.utilization(2.0, 1000.0) == {"mfu": 0.1, "hfu": 0.15}
    assert flops.utilization(2.0, None) == {}


def test_a_forward_pass_is_a_third():
    """Against a count of the model's own products, which knows no formula."""
    from jaxckpt.models import Transformer

    model = Transformer(MODEL, remat="none")
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    forward = count_flops(jax.make_jaxpr(model.apply)(params, tokens))
    assert 3 * forward == by_hand(128)
