"""Adopted models on a chip that is not here: temporaries under `full`, beside the loop's.

The models are those of the other files, with more layers and rows: the temporaries have to be many
times the parameters, and larger than the chip's on-chip memory, which is not counted.
"""

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
_LONG = {"depth": 8, "batch": 128, "length": 128, "width": 128}
SIZES = {
    test_batch_norm: {"depth": 8, "batch": 32, "side": 32, "width": 128},
    test_data_parallel: {"batch": 2**17},
    test_equinox_list: _LONG,
    test_experts: {"batch": 2**17},
    test_kinds: _LONG | {"depth": 14, "batch": 32},
    test_linen_list: _LONG,
    test_nnx_list: _LONG,
    test_two_stacks: _LONG | {"depth": 10, "batch": 32},
}


@pytest.mark.heavy
@pytest.mark.parametrize("model", SIZES, ids=lambda model: model.__name__.rpartition("test_")[2])
def test_temporaries_under_full(model):
    try:
        launch.check_available(parse_target(TARGET))
    except launch.Unavailable as error:
        pytest.skip(str(error))
    with getattr(model, "mesh", contextlib.nullcontext)():
        original, adopted, *args = model.pair(**SIZES[model])
        numbers = tuple(range(len(args)))
        before, after = (
            jaxckpt.measure(jax.value_and_grad(loss, numbers), *args, target=TARGET).temp_bytes
            for loss in (original, adopted)
        )
    print(f"{model.__name__} {before} {after} {after / before:.3f}")
    assert after <= WELL_BELOW * before, (before, after)
