"""Eight devices: every plan has one device's loss and gradients, and gathers blocks alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("many_devices")

WHOLE = "data=2,fsdp=2,tensor=2"
PLANS = ("none", "full", "sqrt", "log", "binomial:2", "uniform:2", "every:4+dots", "attention")
PLANS += ("full+offload:carry", "names:q,mid", "2xsqrt/full+dots_no_batch")
# The largest matrix of a block, whole: 32 x 64; a chunk of the loss has 4 x 8 x 32 features.
LARGEST_MATRIX = 32 * 64


def run(*cases, moved: bool = False):
    arguments = [json.dumps(cases), *(["moved"] if moved else [])]
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.eight_devices", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found():
    return run((WHOLE, "log", False), ("data=4,fsdp=2", "full", True), moved=True)


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_one_device(found):
    assert found["cases"][0]["error"] <= 3e-6


@pytest.mark.slow
def test_no_parameter_is_gathered_outside_of_its_block(found):
    """The twin cuts the stack between its blocks: right numbers, and all of it gathered."""
    good, bad = found["cases"]
    assert good["outside"] == []
    assert 0 < max(good["inside"]) <= LARGEST_MATRIX
    assert bad["error"] <= 3e-6
    assert max(bad["outside"] + bad["inside"]) > LARGEST_MATRIX


@pytest.mark.slow
def test_checkpoints_move_between_meshes(found):
    assert found["moved"] == [0.0, 0.0]


@pytest.mark.heavy
@pytest.mark.parametrize("mesh", [WHOLE, "fsdp=8", "data=8", "data=4,tensor=2"])
def test_every_plan(mesh):
    cases = run(*((mesh, plan, False) for plan in PLANS))["cases"]
    for plan, case in zip(PLANS, cases, strict=True):
        assert case["error"] <= 3e-6, plan
        assert case["outside"] == [], plan
        assert max(case["inside"], default=0) <= LARGEST_MATRIX, plan
