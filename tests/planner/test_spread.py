"""A step on several devices: two compiled plans tell what is shared and what is sent."""

import jax
import jax.numpy as jnp
import pytest

from jaxckpt.compiled.buffers import Buffer
from jaxckpt.planner.kinds import Forward, Kind
from jaxckpt.planner.peak_model import Spread
from jaxckpt.planner.stacks import given_stack
from tests.experiments.test_fit import report

GIB = 1 << 30
AGAIN = 2 * 10 * 100.0  # FLOPs of ten blocks in two runs


def kinds() -> tuple[Kind, Kind]:
    none = Kind(schedule="none", kept_bytes=8 * GIB, live_bytes=8 * GIB, seconds=3.0, flops=300)
    full = Kind(schedule="full", kept_bytes=GIB, live_bytes=8 * GIB, seconds=4.0, flops=400)
    return none, full


def spread(devices: int, gib_between: float) -> Spread:
    """Ten blocks; `none` keeps 63 GiB more than `full` over all devices."""
    many = {"num_devices": devices}
    full = report(10.0, collective_seconds=5.0, **many)
    none = report(10.0 + gib_between, collective_seconds=4.0, **many)
    return Spread.of((), 63.0 * GIB, AGAIN, full, none)


@pytest.mark.parametrize("between, parts", [(62.0, 1), (8.5, 8), (16.0, 4), (30.0, 2), (-1.0, 8)])
def test_peaks_tell_how_many_share_what_is_kept(between, parts):
    assert spread(8, between).parts == parts


def test_a_block_run_again_sends_again():
    found = spread(8, 8.0)
    none, full = (found.kind(kind, *kinds()) for kind in kinds())
    assert found.sent_seconds == 4.0
    assert (none.seconds, full.seconds) == (3.0, 4.0 + (5.0 - 4.0) / 20)
    assert found.forward(Forward(seconds=1.0, flops=100.0)).seconds == 1.0 + 1 / 20
    assert (none.kept_bytes, full.kept_bytes) == (GIB, GIB / 8)


def test_a_step_that_does_not_fit_does_not_tell_what_it_sends():
    full = report(10.0, collective_seconds=5.0, num_devices=8)
    found = Spread.of((), 63.0 * GIB, AGAIN, full, report(20.0, num_devices=8))
    assert (found.sent_seconds, found.again_seconds_per_flop, found.num_devices) == (5.0, 0.0, 8)
    neither = [report(size, num_devices=8) for size in (10.0, 20.0)]
    found = Spread.of((), 63.0 * GIB, AGAIN, *neither)
    assert (found.sent_seconds, found.again_seconds_per_flop, found.num_devices) == (0.0, 0.0, 8)


def test_one_device_is_left_alone():
    found = Spread.of((), 63.0 * GIB, AGAIN, report(1.0), report(2.0))
    assert found == Spread()
    assert tuple(found.kind(kind, *kinds()) for kind in kinds()) == kinds()


def held(*shapes: str, devices: int = 1):
    """Returns the report of a step that holds some arrays."""
    buffers = tuple(Buffer(size_bytes=1, shape=shape, operation="") for shape in shapes)
    return report(10.0, num_devices=devices, buffers=buffers)


def stack():
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    return given_stack((lambda x, w: x @ w, shape(8, 8), shape(64, 8)), 6)


@pytest.mark.parametrize(
    ("shapes", "parts"),
    [
        (["f32[6,64,8]"], 1),  # whole on every device
        (["f32[6,8,8]", "f32[64,8]"], 8),
        (["f32[6,16,4]"], 8),
        (["f32[6,64,8]", "f32[6,64,1]"], 16 / 9),  # one stack's are whole, another's are shared
        (["f32[6,64]", "f32[5,64,8]", "f32[6,48,8]", "f32[6,4,1]", "pred[]"], 2),  # none is it
    ],
)
def test_what_full_holds_tells_how_many_share_a_blocks_input(shapes, parts):
    none, full = kinds()
    found = Spread.of([stack()], 63.0 * GIB, AGAIN, held(*shapes, devices=8), report(40.0))
    assert found.parts == 2 and found.carry_parts == pytest.approx(parts)
    assert found.kind(full, none, full).kept_bytes == pytest.approx(GIB / parts)
    assert found.kind(none, none, full).kept_bytes == pytest.approx(GIB / parts + 3.5 * GIB)
