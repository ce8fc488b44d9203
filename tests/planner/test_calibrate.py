"""Seconds by a block that was timed on this machine."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.costs.roofline import Rates
from jaxckpt.planner import calibrate as module
from jaxckpt.planner import fit as fit_module
from jaxckpt.planner.calibrate import Calibration, calibrate
from jaxckpt.planner.kinds import Forward, Kind
from jaxckpt.planner.stacks import given_stack
from jaxckpt.planner.steps import Steps
from jaxckpt.targets.target import LOCAL
from tests.experiments.test_fit import report
from tests.planner import steps

WIDTH, ROWS = 256, 512
RATES = Rates(flops_per_second=1.0, bytes_per_second=1.0, host_bytes_per_second=4.0)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCKPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def block(x, w):
    for _ in range(4):
        x = jnp.tanh(x @ w)
    return x


def arrays():
    return jnp.ones([WIDTH, WIDTH]) / WIDTH, jnp.ones([ROWS, WIDTH])


@pytest.fixture(scope="module")
def timed() -> Calibration:
    return calibrate([given_stack((block, *arrays()), 3)])


def test_a_block_takes_what_it_takes(monkeypatch, tmp_path):
    """By a clock that ticks with each product: a block has four, and twice as many backward."""
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))
    now, stack = [0.0], given_stack((block, *arrays()), 3)
    jit = jax.jit

    def ticking(fn):
        def run(*args):
            now[0] += str(jax.make_jaxpr(fn)(*args)).count("dot_general")
            return compiled(*args)

        compiled = jit(fn)
        run.lower = compiled.lower
        return run

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module.jax, "jit", ticking)
    found = calibrate([stack])
    assert (found.forward_seconds, found.backward_seconds) == (4.0, 8.0)
    assert found.host_bytes_per_second is None


def test_a_clock_of_this_machine_is_read(timed):
    assert timed.forward_seconds > 0 and timed.backward_seconds >= 0


def test_the_second_time_is_read_from_disk(timed, monkeypatch):
    monkeypatch.setattr(module, "_seconds", None)
    stack = given_stack((block, *arrays()), 3)
    assert calibrate([stack]) == timed
    twice = calibrate([stack, stack])
    assert twice.forward_seconds == 2 * timed.forward_seconds
    other = given_stack((lambda x, w: block(block(x, w), w), *arrays()), 3)
    with pytest.raises(TypeError):  # another block is timed
        calibrate([other])


def test_passes_are_scaled_each_by_its_own_factor():
    clock = Calibration(forward_seconds=4.0, backward_seconds=3.0, host_bytes_per_second=None)
    kind = lambda seconds, **more: Kind(
        schedule="full", kept_bytes=1, live_bytes=1, seconds=seconds, flops=1, **more
    )
    known = {"none": kind(3.0), "forward": Forward(seconds=1.0, flops=1), "rates": RATES}
    assert clock.kind(kind(3.0), **known).seconds == 4.0 + 3.0
    assert clock.kind(kind(4.0), **known).seconds == 4.0 + 3.0 + 4.0, "one more pass forward"
    moved = kind(99.0, device_seconds=3.5, host_bytes=20.0)
    assert clock.kind(moved, **known).seconds == max(4.0, 5.0) + max(3.0 + 2.0, 5.0)
    assert clock.forward(known["forward"]).seconds == 4.0


def test_the_link_is_the_one_that_was_timed():
    clock = Calibration(forward_seconds=1.0, backward_seconds=1.0, host_bytes_per_second=7.0)
    assert clock.link(RATES).host_bytes_per_second == 7.0
    unknown = dataclasses.replace(clock, host_bytes_per_second=None)
    assert unknown.link(RATES) == RATES
    assert module._link() > 1e6


def test_the_planner_says_whose_seconds_they_are(monkeypatch):
    clock = Calibration(forward_seconds=1.0, backward_seconds=2.0, host_bytes_per_second=None)
    monkeypatch.setattr("jaxckpt.planner.problem.calibrate", lambda stacks: clock)
    of = Steps(steps.step_for, LOCAL, lambda plan: report(3.0 if str(plan) == "none" else 1.0))
    found = fit_module.solve(of, steps.NUM_BLOCKS, target=LOCAL, budget=2**40, calibrate=True)
    assert found.chosen.seconds >= 3.0 * steps.NUM_BLOCKS, "the block's seconds, not a roofline's"
    assert "a step by the roofline, calibrated by a block timed here" in found.summary


def test_another_chip_cannot_be_timed():
    with pytest.raises(ValueError, match="calibrate times the chip of this process; v5e-1 is not"):
        jaxckpt.fit(steps.step_for, num_blocks=6, target="v5e-1", calibrate=True)
