"""The Transformer's loss head: the plain loss and its gradients, without all logits at once."""

import dataclasses
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.config import ConfigError, TrainConfig
from experiments.training.step import init_state, make_train_step, make_validation_step
from jaxckpt.models import Transformer, TransformerConfig, next_token_loss
from tests.transforms.cases import relative_error

TIED = TransformerConfig(
    vocab_size=512, num_blocks=3, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32
)
UNTIED = dataclasses.replace(TIED, tied_embeddings=False)
TOKENS = np.random.default_rng(0).integers(0, 512, [4, 65])


def parameters(config):
    return Transformer(config).init(jax.random.key(0), TOKENS[:, :-1])["params"]


def plain_loss(params, tokens, config, z_loss=0.0):
    logits = Transformer(config).apply({"params": params}, tokens[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return (losses + z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))).mean()


def chunked_loss(params, tokens, config, **options):
    x_BSD = Transformer(config).apply({"params": params}, tokens[:, :-1], method="features")
    return next_token_loss(x_BSD, params, tokens[:, 1:], config, **options)


@pytest.mark.slow
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_the_parameter_tree_is_that_of_qwen3(config):
    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters(config))
    name = lambda path: "/".join(key.key for key in path)
    expected = {
        "embed_tokens/embedding": (512, 16),
        "layers/input_layernorm/scale": (3, 16),
        "layers/mlp/down_proj/kernel": (3, 32, 16),
        "layers/mlp/gate_proj/kernel": (3, 16, 32),
        "layers/mlp/up_proj/kernel": (3, 16, 32),
        "layers/post_attention_layernorm/scale": (3, 16),
        "layers/self_attn/k_norm/scale": (3, 8),
        "layers/self_attn/k_proj/kernel": (3, 16, 8),
        "layers/self_attn/o_proj/kernel": (3, 16, 16),
        "layers/self_attn/q_norm/scale": (3, 8),
        "layers/self_attn/q_proj/kernel": (3, 16, 16),
        "layers/self_attn/v_proj/kernel": (3, 16, 8),
        "norm/scale": (16,),
    }
    if not config.tied_embeddings:
        expected["lm_head/kernel"] = (16, 512)
    assert {name(path): leaf.shape for path, leaf in leaves} == expected


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"chunk_tokens": 32}, {"z_loss": 1e-2}])
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_loss_and_gradients_are_those_of_logits(config, options):
    params = parameters(config)
    z_loss = options.get("z_loss", 0.0)
    want = jax.value_and_grad(plain_loss)(params, TOKENS, config, z_loss)
    got = jax.value_and_grad(chunked_loss)(params, TOKENS, config, **options)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    assert relative_error(got, want) < 2e-6
    other = jax.value_and_grad(plain_loss)(params, TOKENS, config, z_loss + 1e-3)
    assert relative_error(got, other) > 1e-4, "the comparison sees the weight of z"


@pytest.mark.slow
def test_in_bf16_the_logits_are_summed_in_float32():
    config = dataclasses.replace(TIED, dtype="bf16")
    params = parameters(config)
    exact = chunked_loss(params, TOKENS, TIED)
    head = lambda loss: abs(loss(params, TOKENS, config) - exact)
    assert head(chunked_loss) < 1e-3


def train_config(**changes) -> TrainConfig:
    given = {"model": TIED, "steps": 4, "batch_size": 4, "seq_len": 64, "remat": "full"}
    return TrainConfig(**given | changes)


def compiled_step(config: TrainConfig):
    state = jax.eval_shape(lambda: init_state(config))
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), jnp.int32)
    step = jax.jit(make_train_step(config), donate_argnums=0)
    return step.trace(state, tokens).lower().compile()


def sizes_over_vocabulary(compiled, vocab_size: int) -> set[int]:
    """Returns the numbers of elements of the module's arrays with an axis of the vocabulary."""
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    axes = [[int(size) for size in shape.split(",")] for shape in shapes]
    return {math.prod(shape) for shape in axes if vocab_size in shape}


@pytest.mark.slow
def test_a_step_has_no_array_of_tokens_times_vocabulary():
    model = dataclasses.replace(TIED, vocab_size=509)  # a prime: no other axis has it
    weights, tokens = 509 * 16, 4 * 64
    found = sizes_over_vocabulary(
        compiled_step(train_config(model=model, loss_chunk_tokens=32)), 509
    )
    assert max(found) == 32 * 509 and weights in found
    # The twin: with the tokens in one chunk, it has.
    found = sizes_over_vocabulary(
        compiled_step(train_config(model=model, loss_chunk_tokens=tokens)), 509
    )
    assert max(found) == tokens * 509


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_temp_falls_with_the_chunk(accumulate):
    model = dataclasses.replace(TIED, vocab_size=4096)
    temp = lambda tokens: (
        compiled_step(train_config(model=model, loss_chunk_tokens=tokens, accumulate=accumulate))
        .memory_analysis()
        .temp_size_in_bytes
    )
    whole = 4 * 64 // accumulate
    logits = 4 * whole * 4096
    assert temp(whole) - temp(whole // 8) > 0.8 * (1 - 1 / 8) * logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"accumulate": 2}, marks=pytest.mark.heavy),
        {"accumulate": 2, "loss_chunk_tokens": 16},
    ],
)
def test_accumulation_and_chunks_change_no_gradient(changes):
    def norms(config):
        state, losses = jax.jit(lambda: init_state(config))(), []
        step = jax.jit(make_train_step(config))
        for _ in range(3):
            state, metrics = step(state, TOKENS)
            losses.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
        return losses

    want = norms(train_config(z_loss=1e-3))
    np.testing.assert_allclose(norms(train_config(z_loss=1e-3, **changes)), want, rtol=2e-6)
    assert abs(norms(train_config())[0][0] - want[0][0]) > 1e-3, "z_loss reaches the step"


@pytest.mark.slow
def test_validation_is_the_cross_entropy_alone():
    params = parameters(TIED)
    for changes in ({}, {"z_loss": 1.0}, {"loss_chunk_tokens": 8}):
        loss, count = make_validation_step(train_config(**changes))(params, TOKENS)
        assert count == TOKENS[:, 1:].size
        np.testing.assert_allclose(loss, plain_loss(params, TOKENS, TIED), rtol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"loss_chunk_tokens": 10},
            r"loss_chunk_tokens 10 does not cut 4 rows of 64 positions evenly; nearest valid: 8, ",
        ),
        ({"loss_chunk_tokens": 4, "accumulate": 4}, None),
        ({"loss_chunk_tokens": -1}, "loss_chunk_tokens is -1; the least is 0"),
        ({"z_loss": -1.0}, "z_loss is -1.0; the least is 0"),
        ({"z_loss": float("nan")}, "z_loss is nan; the least is 0"),
    ],
)
def test_chunks_and_weights_that_cannot_be(changes, message):
    if message is None:
        assert train_config(**changes).loss_chunk_tokens == changes["loss_chunk_tokens"]
        return
    with pytest.raises(ConfigError, match=message):
        train_config(**changes)
