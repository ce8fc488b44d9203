"""Adopted models on a chip that is not here: temporaries under `full`, beside the loop's."""

import jax
import pytest

import jaxckpt
from jaxckpt.absent import launch
from jaxckpt.targets.target import parse_target
from tests.adoption import test_data_parallel, test_equinox_list, test_experts, test_linen_list
from tests.adoption.cases import WELL_BELOW

TARGET = "v5e-1"
# How many times the batch of the test that runs here: more where parameters would be most of it.
TIMES = {test_data_parallel: 128, test_equinox_list: 1, test_experts: 128, test_linen_list: 1}


@pytest.mark.heavy
@pytest.mark.parametrize("model", TIMES, ids=lambda model: model.__name__.rpartition("test_")[2])
def test_temporaries_under_full(model):
    try:
        launch.check_available(parse_target(TARGET))
    except launch.Unavailable as error:
        pytest.skip(str(error))
    *losses, params, x = model.pair()
    args = (params, jax.ShapeDtypeStruct((TIMES[model] * len(x), *x.shape[1:]), x.dtype))
    before, after = (
        jaxckpt.measure(jax.value_and_grad(loss, argnums=(0, 1)), *args, target=TARGET).temp_bytes
        for loss in losses
    )
    print(f"{model.__name__} {before} {after} {after / before:.3f}")
    assert after <= WELL_BELOW * before, (before, after)
