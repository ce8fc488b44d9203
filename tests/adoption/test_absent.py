"""The adopted models on a chip that is not here: temporaries under `full`, beside the loop's."""

import contextlib

import jax
import pytest

import jaxckpt
from jaxckpt.absent import launch
from jaxckpt.targets.target import parse_target
from tests.adoption import (
    test_batch_norm,
    test_data_parallel,
    test_equinox_list,
    test_experts,
    test_kinds,
    test_linen_list,
    test_nnx_list,
    test_two_stacks,
)
from tests.adoption.cases import WELL_BELOW

TARGET = "v5e-1"
# Layers, and how many times the batch of the test that runs here. More than there where a list's
# first layer is not in it and keeps its residuals, or parameters are most of the temporaries.
MODELS = {
    test_batch_norm: (8, 128),
    test_data_parallel: (8, 128),
    test_equinox_list: (6, 1),
    test_experts: (12, 128),
    test_kinds: (14, 1),
    test_linen_list: (6, 1),
    test_nnx_list: (6, 1),
    test_two_stacks: (8, 16),
}


def temp_bytes(loss, args) -> int:
    """Returns the temporaries of a loss's gradient by all arguments.

    The arguments are handed over as leaves, because NNX's states do not travel to another process.
    """
    leaves, tree = jax.tree.flatten(args)

    def step(leaves):
        args = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(jax.value_and_grad(loss, argnums=tuple(range(len(args))))(*args))

    return jaxckpt.measure(step, leaves, target=TARGET).temp_bytes


@pytest.mark.heavy
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__.rpartition("test_")[2])
def test_temporaries_under_full(model, monkeypatch):
    try:
        launch.check_available(parse_target(TARGET))
    except launch.Unavailable as error:
        pytest.skip(str(error))
    num_layers, times = MODELS[model]
    monkeypatch.setattr(model, "L", num_layers)
    larger = lambda x: jax.ShapeDtypeStruct((times * len(x), *x.shape[1:]), x.dtype)
    mesh = getattr(model, "on_mesh", contextlib.nullcontext)
    with mesh():
        original, adopted, params, *batches = model.pair()
        args = (params, *map(larger, batches))
        before, after = (temp_bytes(loss, args) for loss in (original, adopted))
    print(f"{model.__name__} {before} {after} {after / before:.3f}")
    assert after <= WELL_BELOW * before, (before, after)
