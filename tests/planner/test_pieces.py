"""Plans over blocks against brute force, on the planner's own figures."""

import itertools

import numpy as np
import pytest

from jaxckpt.planner.across_blocks import draft, drafts, hull, run_of
from jaxckpt.planner.kinds import Forward, Kind
from jaxckpt.plans import Plan
from jaxckpt.targets.links import HostLink

FORWARD = Forward(seconds=1.0, flops=1.0)


def kinds_of(dots_bytes: float, dots_seconds: float) -> list[Kind]:
    """Three kinds: residuals weigh 17 carries."""
    dots = Plan.parse("dots").stages[0].policies
    return [
        Kind(schedule="none", kept_bytes=17, live_bytes=0, seconds=3.0, flops=3),
        Kind(schedule="full", kept_bytes=1, live_bytes=16, seconds=4.0, flops=4),
        Kind(
            schedule="full",
            policies=dots,
            kept_bytes=dots_bytes,
            live_bytes=17 - dots_bytes,
            seconds=dots_seconds,
            flops=3.5,
        ),
    ]


def frontier(found) -> list[tuple[float, float]]:
    """Returns the (peak, seconds) that nothing beats."""
    kept = []
    for peak, seconds in sorted(found):
        if not kept or seconds < kept[-1][1] - 1e-9:
            kept.append((peak, seconds))
    return kept


@pytest.mark.parametrize("num_blocks", range(1, 9))
@pytest.mark.parametrize("dots", [(9, 3.2), (5, 3.5), (13, 3.1)])
@pytest.mark.parametrize("head", [0, 1000])
def test_stages_of_three_kinds_equal_brute_force(num_blocks, dots, head):
    kinds = kinds_of(*dots)
    assert len(hull(kinds)) == 3
    # With a loss head above all blocks the sum counts, else the worst stage.
    peak = lambda one: max(one.worst_bytes, head + one.kept_bytes)
    is_short = lambda stages: any(s.count == 1 and s.schedule == "full" for s in stages)
    every = []
    for choice in itertools.product(kinds, repeat=num_blocks):
        runs = [(kind, len(list(same))) for kind, same in itertools.groupby(choice, key=id)]
        by_id = {id(kind): kind for kind in kinds}
        one = draft([run_of(by_id[kind], count) for kind, count in runs])
        if num_blocks == 1 or not is_short(one.stages):
            every.append((peak(one), one.seconds))
    plain = ("none", "full")
    found = [
        (peak(one), one.seconds)
        for one in drafts(kinds, FORWARD, num_blocks)
        if all(stage.schedule in plain for stage in one.stages)
    ]
    np.testing.assert_allclose(frontier(found), frontier(every))


def test_order_of_stages_is_the_cheapest():
    none, full, dots = kinds_of(9, 3.2)
    runs = [run_of(none, 2), run_of(full, 3), run_of(dots, 4)]
    worst = {order: draft(order).worst_bytes for order in itertools.permutations(runs)}
    assert min(worst, key=worst.get) == (runs[1], runs[2], runs[0])


def test_every_plan_parses_and_binds():
    texts = {str(one.plan) for one in drafts(kinds_of(9, 3.2), FORWARD, 6)}
    for text in texts:
        assert Plan.parse(text).bind(6).num_blocks == 6
    assert {"none", "full", "dots", "sqrt", "log", "binomial:2", "uniform:2"} <= texts
    assert {"2xfull/none", "3xfull/2xdots/1xnone", "4xbinomial:2/2xnone"} & texts


def test_schedules_count_what_they_run():
    kinds = kinds_of(9, 3.2)
    by_text = {str(one.plan): one for one in drafts(kinds, FORWARD, 8)}
    # REVOLVE's 11 extra forwards with 3 carries, and the last block again.
    assert by_text["binomial:3"].seconds == 8 * 3.0 + 12
    assert by_text["binomial:3"].worst_bytes == 4 + 17
    # Two segments of 4: the last is kept, the first run once more.
    assert by_text["uniform:2"].seconds == 8 * 3.0 + 4
    assert by_text["uniform:2"].kept_bytes == 2 + 4 * 17


@pytest.mark.parametrize(
    ("rate", "overlaps", "binomial_seconds", "uniform_seconds"),
    # 8 s forward, and backward 28 s and 20 s; 4 or 2 bytes go out, 8 or 2 come back.
    [
        (1.0, True, 8 + 28, 8 + 20),
        (0.25, True, 16 + 32, 8 + 20),
        (0.125, True, 32 + 64, 16 + 20),
        (1.0, False, 8 + 4 + 28 + 8, 8 + 2 + 20 + 2),
    ],
)
def test_schedules_whose_carries_are_on_the_host(rate, overlaps, binomial_seconds, uniform_seconds):
    link = HostLink(bytes_per_second=rate, overlaps=overlaps)
    by_text = {str(one.plan): one for one in drafts(kinds_of(9, 3.2), FORWARD, 8, link)}
    moved = by_text["binomial:3+offload:carry"]
    assert moved.seconds == binomial_seconds
    # Two carries are on their way; the residuals of one block are there as ever.
    assert (moved.kept_bytes, moved.worst_bytes, moved.host_bytes) == (0, 17 + 2, 4)
    assert moved.flops == by_text["binomial:3"].flops
    moved = by_text["uniform:2+offload:carry"]
    assert moved.seconds == uniform_seconds
    assert (moved.kept_bytes, moved.host_bytes) == (4 * 17, 2)
    assert by_text["uniform:2+dots+offload:carry"].kept_bytes == 4 * 9


LINK = HostLink(bytes_per_second=1.0)


def test_without_a_link_no_schedule_moves():
    kinds = kinds_of(9, 3.2)
    texts = [str(one.plan) for one in drafts(kinds, FORWARD, 7)]
    with_link = [str(one.plan) for one in drafts(kinds, FORWARD, 7, LINK)]
    assert texts == [text for text in with_link if "offload" not in text]
    assert {"sqrt+offload:carry", "4xlog+offload:carry/3xfull"} <= set(with_link)
