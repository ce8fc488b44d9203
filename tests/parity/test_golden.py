"""Logits and gradients are those of transformers' Qwen3, under every kind of plan.

The fixture is `make_golden.py`'s: weights that transformers saved, and what it computed with them.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from experiments.weights.load import check_weights, load_params, read_shape
from jaxckpt.models import Transformer, next_token_loss, qwen3
from tests.parity.make_golden import GOLDEN, LENGTHS

TOLERANCE = 1e-5  # of a leaf's largest value
PLANS = ("none", "sqrt", "attention")
CASES = [(h, n, plan) for h in ("tied", "untied") for n in LENGTHS for plan in PLANS]
GATE = (("tied", 9, "attention"), ("untied", 24, "sqrt"))


def marked(case):
    return case if case in GATE else pytest.param(*case, marks=pytest.mark.heavy)


@functools.cache
def golden(head: str, length: int) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / head / "golden.npz") as found:
        start = f"{length}/"
        return {n.removeprefix(start): found[n] for n in found.files if n.startswith(start)}


@functools.cache
def model_of(head: str, plan: str):
    folder = GOLDEN / head
    config = dataclasses.replace(read_shape(folder), dtype="f32")
    check_weights(folder, config)
    model = Transformer(config, remat=plan)
    like = jax.eval_shape(model.init, jax.random.key(0), np.zeros([1, 2], np.int32))["params"]
    return model, load_params(folder, like)


def as_saved(head: str, gradients) -> dict[str, np.ndarray]:
    """Returns gradients by the names and in the layout of the checkpoint."""
    flat = traverse_util.flatten_dict(gradients)
    found = {}
    for tensor in qwen3.tensors(read_shape(GOLDEN / head)):
        leaf = np.asarray(flat[tensor.path])
        leaf = leaf if tensor.block is None else leaf[tensor.block]
        found[tensor.name] = leaf.T if tensor.transposed else leaf
    return found


def error(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape and np.abs(expected).max() > 1e-4
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("head, length, plan", list(map(marked, CASES)))
def test_logits_and_gradients_are_those_of_transformers(head, length, plan):
    expected, (model, params) = golden(head, length), model_of(head, plan)
    tokens, logits = expected["tokens"], expected["logits"]

    def loss(params):
        x = model.apply({"params": params}, tokens[:, :-1], method="features")
        return next_token_loss(x, params, tokens[:, 1:], model.config)

    got = jax.jit(lambda params: model.apply({"params": params}, tokens[:, :-1]))(params)
    assert error(np.asarray(got), logits) < TOLERANCE
    gradients = as_saved(head, jax.jit(jax.grad(loss))(params))
    assert gradients.keys() == expected.keys() - {"tokens", "logits"}
    worst = {name: error(leaf, expected[name]) for name, leaf in gradients.items()}
    assert max(worst.values()) < TOLERANCE, worst
