"""A step on several devices: compiled plans tell what is shared, what is held and what is sent."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from jaxckpt.compiled.buffers import Buffer
from jaxckpt.costs.roofline import UNKNOWN
from jaxckpt.planner.across_blocks import run_of
from jaxckpt.planner.across_stacks import Part
from jaxckpt.planner.kinds import Forward, Kind, kind_cost
from jaxckpt.planner.peak_model import Spread, all_keeping, as_compiled
from jaxckpt.planner.stacks import given_stack
from jaxckpt.plans import Plan, Stage
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


def held(*shapes: str, peak: float = 10.0):
    """Returns the report of a step of eight devices that holds some arrays of float32."""
    size = lambda shape: 4 * math.prod(map(int, re.findall(r"\d+", shape.partition("[")[2])))
    buffers = (Buffer(size_bytes=size(shape), shape=shape, operation="") for shape in shapes)
    return report(peak, num_devices=8, buffers=tuple(buffers))


def part(*changed: Kind) -> Part:
    """Returns a part of six blocks; under `none` they keep an array of another shape too."""
    none, full = kinds()
    none = dataclasses.replace(none, shapes=frozenset({(6, 64, 8), (6, 64, 32)}))
    full = dataclasses.replace(full, shapes=frozenset({(6, 64, 8)}))
    found = (none, full, *changed)
    return Part(num_blocks=6, kinds=found, plain=found, forward=Forward(seconds=1.0, flops=100.0))


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
    found = Spread.of([part()], 63.0 * GIB, AGAIN, held(*shapes), held(peak=40.0))
    assert found.parts == 2 and found.carry_parts == pytest.approx(parts)
    assert found.kind(full, none, full).kept_bytes == pytest.approx(GIB / parts)
    assert found.kind(none, none, full).kept_bytes == pytest.approx(GIB / parts + 3.5 * GIB)


@pytest.mark.parametrize(
    ("shapes", "parts"),
    [
        (["f32[6,8,32]"], 8),
        (["f32[6,64,8]", "f32[6,8,32]"], 8),  # the first is a block's input, as under `full`
        (["f32[6,64,8]", "f32[6,64,8]"], 1),  # the second is not; whole, as the peaks tell
        (["f32[6,64,8]", "f32[6,64,32]", "f32[6,8,32]"], 16 / 9),
        (["f32[6,64,8]"], 1),  # the peaks tell
    ],
)
def test_what_none_holds_besides_tells_how_many_share_it(shapes, parts):
    full, none = held("f32[6,64,8]"), held(*shapes, peak=70.0)
    found = Spread.of([part()], 63.0 * GIB, AGAIN, full, none)
    assert (found.carry_parts, found.parts) == (1, pytest.approx(parts))
    assert found.policy_parts == found.parts


def test_what_policies_keep_is_shared_in_its_own_way():
    none, full = kinds()
    shapes = frozenset({(6, 64, 8), (6, 64, 32)})
    policies = Plan.parse("dots").stages[0].policies
    dots = dataclasses.replace(full, policies=policies, kept_bytes=3 * GIB, shapes=shapes)
    whole, split = (["f32[6,64,8]", text] for text in ("f32[6,64,32]", "f32[6,8,32]"))
    reports = held(whole[0]), held(*whole, peak=70.0), held(*split)
    found = Spread.of([part(dots)], 63.0 * GIB, AGAIN, *reports)
    assert (found.carry_parts, found.parts, found.policy_parts) == (1, 1, 8)
    assert found.kind(dots, none, full).kept_bytes == GIB + 2 * GIB / 8
    assert found.kind(none, none, full).kept_bytes == 8 * GIB


def test_a_kind_knows_the_shapes_of_what_all_blocks_keep():
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    block = lambda x, w: jnp.sin(x @ w[0]) @ w[1]
    stack = given_stack((block, (shape(8, 32), shape(32, 8)), shape(64, 8)), 6)
    shapes = lambda stage: kind_cost([stack], Stage(schedule=stage), UNKNOWN).shapes
    assert shapes("full") == {(6, 64, 8)}
    assert shapes("none") == {(6, 64, 8), (6, 64, 32)}


def compiled(worst_gib: float, is_spread: bool = True) -> Part:
    """Returns a part, fitted to what `none` holds."""
    _, full = kinds()
    policies = Plan.parse("dots").stages[0].policies
    dots = dataclasses.replace(full, policies=policies, kept_bytes=4 * GIB)
    return as_compiled([part(dots)], worst_gib * GIB, is_spread=is_spread)[0]


@pytest.mark.parametrize("is_spread", [False, True])
def test_arrays_of_other_devices_are_held_whatever_is_kept(is_spread):
    """`none` holds 48 GiB for six blocks, and 20 GiB while one is reversed: more than copies."""
    found = compiled(48.0 + 20.0, is_spread)
    none, full, dots = found.kinds
    assert (none.kept_bytes, none.live_bytes) == (8 * GIB, pytest.approx(20 * GIB))
    alone = run_of(none, 1).live_bytes  # a single block copies nothing
    assert full.live_bytes == 8 * GIB
    if is_spread:
        assert alone == pytest.approx(20 * GIB) and dots.live_bytes == pytest.approx(20 * GIB)
    else:
        assert alone == 0 and dots.live_bytes < 20 * GIB


def test_copies_are_not_arrays_of_other_devices():
    found = compiled(48.0 + 6.0)
    assert found.kind("none").live_bytes == pytest.approx(6 * GIB)
    assert run_of(found.kind("none"), 1).live_bytes == 0
    assert found == compiled(48.0 + 6.0, is_spread=False)


def test_the_third_anchor_corrects_what_keeps_as_much():
    _, full = kinds()
    plans = [Plan.parse(text).stages[0].policies for text in ("dots", "dots_no_batch", "names:h")]
    sizes = (4.0, 4.0, 2.0)
    found = (
        dataclasses.replace(full, policies=policies, kept_bytes=size * GIB)
        for policies, size in zip(plans, sizes, strict=True)
    )
    own = dataclasses.replace(part(*found), turns=2)
    assert own.keeping.policies == plans[0]
    live = [kind.live_bytes / GIB for kind in own.holding(0.5 * GIB).kinds]
    assert live == [8, 8, 9, 9, 8]
    assert all_keeping([own.holding(0.5 * GIB)]).worst_bytes == (
        all_keeping([own]).worst_bytes + 0.5 * GIB
    )
    assert part().holding(GIB) == part(), "no kind has policies"
