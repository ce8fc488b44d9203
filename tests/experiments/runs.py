"""Runs of experiments.train in processes of their own, as the tests of survival need them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1

ROOT = Path(__file__).parents[2]
HANG_SECONDS = 3600  # ends what hangs; no bound on speed
SHAPE = (
    "--num-blocks=3",
    "--d-model=16",
    "--num-heads=2",
    "--num-kv-heads=1",
    "--head-dim=8",
    "--d-ff=32",
    "--dropout=0.1",
    "--batch-size=4",
    "--seq-len=16",
)
TINY = (*SHAPE, "--validation-batches=1", "--remat=full")


def start(
    *flags,
    cache: Path,
    largest_file_kib: int | None = None,
    devices: int = 1,
    first_path: Path = ROOT,
    module: tuple[str, ...] = ("experiments.train",),
) -> subprocess.Popen:
    """Starts a tiny run; flags given here win over `TINY`.

    With `largest_file_kib`, writing more than that to a file fails, as on a full disk. `devices`
    is how many devices JAX finds, `first_path` where Python looks for modules first, `module` what
    takes the flags, with its own arguments before them.
    """
    given = {str(flag).partition("=")[0] for flag in flags}
    flags = [flag for flag in TINY if flag.partition("=")[0] not in given] + [*map(str, flags)]
    command = [sys.executable, "-m", *module, *flags, f"--compile-cache={cache}"]
    if largest_file_kib is not None:
        command = ["bash", "-c", f'ulimit -f {largest_file_kib} && exec "$@"', "bash", *command]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": f"{first_path}{os.pathsep}{ROOT}",
            "PYTHONUNBUFFERED": "1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits; returns exit code, standard output and standard error."""
    out, err = process.communicate(timeout=HANG_SECONDS)
    return process.returncode, out, err


def train(*flags, cache: Path, **options) -> str:
    """Runs to the end; returns what was printed.

    Raises:
      AssertionError: The run failed.
    """
    code, out, err = finish(start(*flags, cache=cache, **options))
    assert code == 0, err
    return out


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float]]:
    """Returns `(step, loss)` of every step, and of every validation."""
    return [
        (row["step"], row.get("loss", row.get("validation_loss")))
        for row in rows(folder)
        if "step" in row
    ]


def last_step(folder: Path) -> int:
    """Returns the last step on record, torn lines aside; 0 without a record."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    found = [line for line in text.splitlines() if line.startswith('{"step"')]
    return max((int(line.split(":")[1].split(",")[0]) for line in found), default=0)


def checkpoint(folder: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Returns the last checkpoint's step and arrays, read by Orbax."""
    checkpointer = v1.training.Checkpointer(folder / "checkpoints")
    try:
        step = checkpointer.latest.step
        tree = checkpointer.load(step, checkpointer.metadata(step).metadata)
    finally:
        checkpointer.close()
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_end(folder: Path, expected: Path):
    """Asserts that two runs have the same curves and, to the bit, the same last state."""
    assert losses(folder) == losses(expected)
    (step, state), (expected_step, expected_state) = checkpoint(folder), checkpoint(expected)
    assert step == expected_step
    assert state.keys() == expected_state.keys()
    for name, leaf in state.items():
        np.testing.assert_array_equal(leaf, expected_state[name], err_msg=name)


def wait_for(process: subprocess.Popen, happened: Callable[[], object]):
    """Waits until something has happened, while a process runs."""
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def kill(process: subprocess.Popen):
    process.send_signal(signal.SIGKILL)
    process.communicate()
