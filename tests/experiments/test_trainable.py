"""Frozen parameters: they do not change, cost no optimizer state and no gradients."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.config import ConfigError, OptimizerConfig, TrainConfig
from experiments.training.build import build
from experiments.training.step import init_state, make_train_step, merge, resolve_model, split
from jaxckpt.memory.measure import compile_step
from jaxckpt.models.config import TransformerConfig

pytestmark = pytest.mark.slow

MODEL = TransformerConfig(num_blocks=4, vocab_size=64, dtype="f32")
NOW = OptimizerConfig(warmup_steps=0)  # the first step learns
CONFIG = TrainConfig(model=MODEL, optimizer=NOW, batch_size=4, seq_len=32, steps=4, remat="sqrt")
ATTENTION = dataclasses.replace(CONFIG, trainable=("layers/self_attn/*",))
TOKENS = np.arange(4 * 33).reshape(4, 33) % 64


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("plan", ["none", "full", "uniform:2", "sqrt"])
def test_the_rest_is_frozen(plan):
    config = dataclasses.replace(ATTENTION, remat=plan)
    before = init_state(config)
    after, metrics = jax.jit(make_train_step(config))(before, TOKENS)
    trainable, frozen = split(before.params, config.trainable)
    now, still = split(after.params, config.trainable)
    assert all(map(np.array_equal, jax.tree.leaves(frozen), jax.tree.leaves(still)))
    kernel = lambda tree: tree["layers"]["self_attn"]["q_proj"]["kernel"]
    assert not np.array_equal(kernel(trainable), kernel(now)) and metrics["gradient_norm"] > 0


def test_gradients_of_what_learns_are_those_of_the_whole():
    """The norm of a part's gradients is the same part of the whole's."""
    everything = dataclasses.replace(CONFIG, trainable=("*",))

    def of(config):
        metrics = jax.jit(make_train_step(config))(init_state(config), TOKENS)[1]
        return {name: float(metrics[name]) for name in ("loss", "gradient_norm")}

    assert of(everything)["gradient_norm"] == pytest.approx(of(CONFIG)["gradient_norm"], rel=1e-6)
    assert of(ATTENTION)["gradient_norm"] < of(CONFIG)["gradient_norm"]
    assert of(ATTENTION)["loss"] == pytest.approx(of(CONFIG)["loss"], rel=1e-6)


def test_frozen_parameters_cost_less():
    state, part = (jax.eval_shape(lambda c=c: init_state(c)) for c in (CONFIG, ATTENTION))
    learns, _ = split(part.params, ATTENTION.trainable)
    assert nbytes(part.optimizer) < 2.1 * nbytes(learns) < nbytes(state.optimizer)
    reports = [compile_step(build(config, "local"))[1] for config in (CONFIG, ATTENTION)]
    assert reports[1].flops < reports[0].flops and reports[1].peak_bytes < reports[0].peak_bytes


def test_frozen_parameters_are_kept_in_the_dtype_of_the_computation():
    model = dataclasses.replace(MODEL, dtype="bf16")
    config, _ = resolve_model(dataclasses.replace(ATTENTION, model=model))
    params = jax.eval_shape(lambda: init_state(config)).params
    assert params["embed_tokens"]["embedding"].dtype == "bfloat16"
    assert params["layers"]["self_attn"]["q_proj"]["kernel"].dtype == "float32"


def test_split_and_merge_are_inverse():
    params = {"a": {"b": 1, "c": 2}, "d": {"b": 3}}
    trainable, frozen = split(params, ("*/b",))
    assert trainable == {"a": {"b": 1}, "d": {"b": 3}} and frozen == {"a": {"c": 2}}
    assert merge(trainable, frozen) == params and split(params, ()) == (params, {})


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ConfigError, match=r"'layers/self_atn/\*' matches no parameter.*valid"):
        init_state(dataclasses.replace(CONFIG, trainable=("layers/self_atn/*",)))
