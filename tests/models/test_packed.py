"""Documents packed into one row: loss and gradients are those of the documents alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxckpt.models import Transformer, TransformerConfig, next_token_loss
from tests.transforms.cases import relative_error

CONFIG = TransformerConfig(
    num_blocks=5, d_model=32, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=64, dtype="f32"
)
LENGTHS = (100, 157)  # tokens; a row of 257 has 256 inputs
DOCUMENTS = [np.random.default_rng(i).integers(0, 256, n) for i, n in enumerate(LENGTHS)]
IGNORED = -1


@functools.cache
def parameters():
    model = Transformer(CONFIG)
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


def summed_loss(params, tokens_BS, targets_BS, ids_BS=None, plan="full"):
    model = Transformer(CONFIG, remat=plan)
    x_BSD = model.apply({"params": params}, tokens_BS, ids_BS, method="features")
    return next_token_loss(x_BSD, params, targets_BS, CONFIG, ignore_index=IGNORED, reduction="sum")


def alone(params):
    rows = [document[None] for document in DOCUMENTS]
    return sum(summed_loss(params, row[:, :-1], row[:, 1:]) for row in rows)


def packed(params, plan="full", separate=True):
    row = np.concatenate(DOCUMENTS)
    tokens, targets = row[:-1].copy(), row[1:].copy()
    ids = np.repeat([7, 3], LENGTHS)[:-1].astype(np.int32)
    targets[LENGTHS[0] - 1] = IGNORED  # the other document's first token
    return summed_loss(params, tokens[None], targets[None], ids[None] if separate else None, plan)


@functools.cache
def expected():
    return jax.jit(jax.value_and_grad(alone))(parameters())


GATE = ("none", "attention", "2xfull/binomial:2")
PLANS = ("full", "dots", "sqrt", "uniform:2", "uniform:2+attention", "log")


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", [*GATE, *(pytest.param(plan, marks=pytest.mark.heavy) for plan in PLANS)]
)
def test_packed_equals_alone_under_every_plan(plan):
    """Positions go on through the row; only their differences enter."""
    got = jax.jit(jax.value_and_grad(packed), static_argnums=1)(parameters(), plan)
    assert relative_error(got, expected()) < 2e-5


@pytest.mark.slow
def test_documents_that_see_each_other_do_not():
    got = jax.jit(jax.value_and_grad(functools.partial(packed, separate=False)))(parameters())
    assert relative_error(got, expected()) > 1e-3


def test_a_document_does_not_depend_on_its_neighbor():
    model, ids = Transformer(CONFIG), jnp.array([[0] * 6 + [1] * 10])
    tokens = np.random.default_rng(0).integers(0, 256, [1, 16])
    other = tokens.copy()
    other[0, :6] += 1
    params = parameters()
    run = jax.jit(lambda tokens, ids: model.apply({"params": params}, tokens, ids))
    np.testing.assert_array_equal(run(tokens, ids)[0, 6:], run(other, ids)[0, 6:])
    assert np.abs(run(tokens, None)[0, 6:] - run(other, None)[0, 6:]).max() > 1e-3
