"""Random steps against the planner's promises: `random_steps.py`, on eight virtual devices."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("examples", "seed"), [(2, 0), pytest.param(40, 1, marks=pytest.mark.heavy)]
)
def test_the_planner_keeps_its_promises(examples, seed):
    done = subprocess.run(
        [sys.executable, "-m", "tests.planner.random_steps", str(examples), str(seed)],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.stdout.count("KiB") >= examples
