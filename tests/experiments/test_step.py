"""The train step: the same curve under every plan, nothing recompiled, state donated."""

import dataclasses
import json

import chex
import jax
import numpy as np
import optax
import pytest

import jaxckpt
from experiments.config import TrainConfig
from experiments.data import Corpus
from experiments.training.loop import run
from experiments.training.step import init_state, make_train_step
from jaxckpt.models import TransformerConfig
from tests.transforms.cases import relative_error

pytestmark = pytest.mark.slow

MODEL = TransformerConfig(
    num_blocks=5, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32, dropout=0.1
)
CONFIG = TrainConfig(model=MODEL, steps=6, batch_size=2, seq_len=16, validation_batches=1)


def corpus() -> Corpus:
    tokens = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
    return Corpus(train=tokens[:3000], validation=tokens[3000:], sha256="0" * 64, name="random")


def losses(tmp_path, plan: str) -> list[float]:
    folder = tmp_path / plan.replace("/", "-")
    folder.mkdir()
    run(dataclasses.replace(CONFIG, remat=plan, out=folder), corpus(), folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row.get("loss", row.get("validation_loss")) for row in rows[1:]]


@pytest.mark.heavy
def test_curves_of_plans_lie_on_each_other(tmp_path):
    want = losses(tmp_path, "none")
    assert len(want) == 7
    assert want[0] != want[5]
    for plan in ("sqrt", "2xdots/log", "attention+names:gate"):
        np.testing.assert_allclose(losses(tmp_path, plan), want, rtol=1e-5, err_msg=plan)


def test_nothing_recompiles_and_state_is_donated():
    traced = chex.assert_max_traces(make_train_step(CONFIG), n=1)
    step = jax.jit(traced, donate_argnums=0)
    state = jax.jit(lambda: init_state(CONFIG))()
    tokens = np.zeros([2, 17], np.int32)
    before = state.params["embed_tokens"]["embedding"]
    for _ in range(3):
        state, metrics = step(state, tokens)
    assert before.is_deleted()
    assert np.isfinite(metrics["loss"])


def test_norms_do_not_decay():
    """With a zero gradient, weight decay shrinks matrices and leaves scales at one."""
    from experiments.training.step import make_optimizer

    optimizer = make_optimizer(dataclasses.replace(CONFIG.optimizer, warmup_steps=0), 10)
    params = jax.jit(lambda: init_state(CONFIG))().params
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert np.abs(updates["layers"]["mlp"]["up_proj"]["kernel"]).max() > 0
    assert np.abs(updates["layers"]["input_layernorm"]["scale"]).max() == 0


def test_bf16_computes_in_bf16_and_keeps_float32_weights():
    model = dataclasses.replace(MODEL, dtype="bf16")
    config = dataclasses.replace(CONFIG, model=model, remat="sqrt")
    state = jax.eval_shape(lambda: init_state(config))
    chex.assert_type(jax.tree.leaves(state.params), np.float32)
    tokens = jax.ShapeDtypeStruct((2, 17), np.int32)
    text = str(jax.make_jaxpr(make_train_step(config))(state, tokens))
    assert "bf16[2,16,16]" in text


def first_gradients(config: TrainConfig):
    """Returns the loss and the gradients of a first step; AdamW's first moment holds them."""
    state = jax.jit(lambda: init_state(config))()
    tokens = np.random.default_rng(1).integers(0, 256, [config.batch_size, config.seq_len + 1])
    state, metrics = jax.jit(make_train_step(config))(state, tokens)
    adam = next(x for x in jax.tree.leaves(state.optimizer, is_leaf=is_adam) if is_adam(x))
    return metrics["loss"], adam.mu


def is_adam(x) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


@pytest.mark.parametrize("plan", [pytest.param("full", marks=pytest.mark.heavy), "sqrt"])
def test_accumulated_gradients_are_those_of_the_whole_batch(plan):
    model = dataclasses.replace(MODEL, dropout=0.0)
    config = dataclasses.replace(CONFIG, model=model, remat=plan, batch_size=8)
    want = first_gradients(config)
    for parts in (2, 8):
        got = first_gradients(dataclasses.replace(config, accumulate=parts))
        assert relative_error(got, want) < 1e-5
    # The twin: other data has other gradients by far more than that.
    other = first_gradients(dataclasses.replace(config, batch_size=4))
    assert relative_error(other, want) > 1e-2


def temp_bytes(parts: int) -> int:
    config = dataclasses.replace(CONFIG, remat="none", batch_size=32, seq_len=64, accumulate=parts)
    state = jax.eval_shape(lambda: init_state(config))
    tokens = jax.ShapeDtypeStruct((32, 65), "int32")
    return jaxckpt.measure(make_train_step(config), state, tokens, donate_argnums=0).temp_bytes


def test_activations_fall_as_one_over_the_parts():
    """Twice the parts save half of what the step before saved: temp = fixed + activations / N."""
    two, four, eight = map(temp_bytes, (2, 4, 8))
    activations = temp_bytes(1)
    assert 1.9 < (two - four) / (four - eight) < 2.1
    # What N = 2 -> 4 saves is a quarter of all activations.
    assert 0.9 * activations < 4 * (two - four) <= 1.05 * activations


HALF = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dtype="f16"), remat="sqrt")


def after_one_step(config, scale: float | None = None, steps: int = 0):
    """Returns the state before and after a step, and its metrics."""
    state = jax.jit(lambda: init_state(config))()
    if scale is not None:
        scaled = state.loss_scale._replace(scale=np.float32(scale), steps=np.int32(steps))
        state = state._replace(loss_scale=scaled)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 17)).astype(np.int32)
    return state, *jax.jit(make_train_step(config))(state, tokens)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_float16_scales_its_loss(accumulate):
    """Twin: scaled down instead of up, gradients are lost below what float16 has."""
    half = dataclasses.replace(HALF, accumulate=accumulate)
    full = dataclasses.replace(half, model=dataclasses.replace(MODEL, dtype="f32"))
    state, after, metrics = after_one_step(half)
    chex.assert_type(jax.tree.leaves(after.params), np.float32)
    assert "f16[" in str(jax.make_jaxpr(make_train_step(half))(state, np.zeros([2, 17], np.int32)))
    assert state.loss_scale.scale == after.loss_scale.scale == 2**16 and not metrics["skipped"]
    _, whole, wanted = after_one_step(full)
    assert whole.loss_scale is None
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-2)
    _, _, lost = after_one_step(half, scale=2.0**-18)
    assert lost["gradient_norm"] < 0.9 * wanted["gradient_norm"]


def test_a_scale_that_is_too_large_is_halved_and_grows_again():
    before, after, metrics = after_one_step(HALF, scale=2.0**60)
    assert metrics["skipped"] == metrics["skipped_in_row"] == 1
    chex.assert_trees_all_equal(after.params, before.params)
    assert after.loss_scale.scale == 2.0**59 and after.loss_scale.steps == 0
    _, after, metrics = after_one_step(HALF, scale=2.0, steps=1999)
    assert (after.loss_scale.scale, after.loss_scale.steps, metrics["skipped"]) == (4, 0, 0)
    _, after, _ = after_one_step(HALF, scale=2.0, steps=7)
    assert (after.loss_scale.scale, after.loss_scale.steps) == (2, 8)
