"""Collectives in a compiled program's text, as XLA writes it for CPUs, GPUs and TPUs."""

import pytest

from jaxckpt.compiled.collectives import traffic
from jaxckpt.targets.chips import CHIPS
from jaxckpt.targets.links import Links, links_of

# A loop of 6 trips, one of the executor's (mean 3 of 2), one whose bound is in its condition, and
# on a TPU a gather that stands in two fusions and a reduction that is cut in a third.
PROGRAM = """HloModule step

%known_body (p: f32[8]) -> f32[8] {
  %g.1 = f32[8,16]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%said_body (p: f32[8]) -> f32[8] {
  %r.1 = (f32[10]{0}, f32[6]{0}) all-reduce(%p, %q), channel_id=2, replica_groups={{0,4},{1,5},\
{2,6},{3,7}}, to_apply=%add
}

%bound (p: s32[]) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(5)
  ROOT %c = pred[] compare(%p, %constant.7), direction=LT
}

%joined_bound (p: (f32[8], u32[])) -> pred[] {
  %constant.8 = u32[] constant(8)
  %count = u32[] get-tuple-element(%p), index=1
  ROOT %c = pred[] compare(%count, %constant.8), direction=LT
}

%joined_body (p: (f32[8], u32[])) -> (f32[8], u32[]) {
  %h.1 = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=11,\
 source_target_pairs={{0,1},{1,0}}
  %h.2 = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=12,\
 source_target_pairs={{0,1},{1,0}}
  %constant.9 = u32[] constant(2)
  %next = u32[] add(%count, %constant.9)
  ROOT %t = (f32[8]{0:T(8)}, u32[]) tuple(%x, /*index=1*/%next)
}

%bound_body (p: f32[8]) -> f32[8] {
  %f.1 = bf16[64]{0} fusion(%p), kind=kCustom, calls=%piece
  %f.2 = bf16[64]{0} fusion(%p), kind=kCustom, calls=%piece
  %f.3 = f32[16]{0} fusion(%p), kind=kCustom, calls=%scattered
}

%piece (p: bf16[16]) -> bf16[64] {
  ROOT %g.2 = bf16[64]{0} all-gather(%p), channel_id=3, replica_groups=mesh['a'=2,'b'=4]\
 {'b'}, dimensions={0}
}

%scattered (p: f32[64]) -> f32[16] {
  %all-reduce.3 = f32[64]{0} all-reduce(%p), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %d = f32[16]{0} dynamic-slice(%all-reduce.3, %i), dynamic_slice_sizes={16}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w.1 = f32[8] while(%x), condition=%any, body=%known_body,\
 backend_config={"known_trip_count":{"n":"6"}}
  %w.2 = f32[8] while(%x), condition=%any, body=%said_body,\
 metadata={op_name="jit(f)/jaxckpt_trips_3_of_2/while"}
  %w.3 = f32[8] while(%x), condition=%bound, body=%bound_body, metadata={op_name="jit(f)/while"}
  %w.4 = (f32[8], u32[]) while(%x), condition=%joined_bound, body=%joined_body
  %s.1 = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), channel_id=8, replica_groups={{0,1,2,3}}
  %p.1 = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=9,\
 source_target_pairs={{0,3},{1,0}}
  %a.1 = (f32[1,4]{1,0}, f32[1,4]{1,0}) all-to-all(%x, %y), channel_id=10,\
 replica_groups=[4,2]<=[2,4]T(1,0)
}
"""


def test_kinds_sizes_groups_and_trips():
    found = traffic(PROGRAM, 8).collectives
    assert [(c.kind, c.result_bytes, c.group, c.trips, c.loops) for c in found] == [
        ("all-gather", 512, (0, 1, 2, 3), 6, 1),
        ("all-reduce", 64, (0, 4), 1.5, 1),
        ("all-gather", 128, (0, 1, 2, 3), 5, 1),
        ("reduce-scatter", 64, (0, 1, 2, 3), 5, 1),
        ("collective-permute", 16, (0, 1), 4, 1),  # two trips in one
        ("collective-permute", 16, (0, 1), 4, 1),
        ("all-gather", 64, (0, 1, 2, 3), 1, 0),
        ("collective-permute", 16, (0, 3), 1, 0),
        ("all-to-all", 32, (0, 4), 1, 0),
    ]


def test_bytes_that_one_device_sends():
    sent = [c.sent_bytes for c in traffic(PROGRAM, 8).collectives]
    assert sent == [384, 64, 96, 192, 16, 16, 48, 16, 16]
    assert traffic(PROGRAM, 8).bytes == 6 * 384 + 1.5 * 64 + 5 * (96 + 192) + 8 * 16 + 48 + 16 + 16


def test_time_is_that_of_the_slowest_link():
    near = Links(bytes_per_second=100.0)
    far = Links(bytes_per_second=100.0, near=4, far_bytes_per_second=10.0)
    crossing = 1.5 * 64 + 16
    inside = traffic(PROGRAM, 8).bytes - crossing
    assert traffic(PROGRAM, 8).seconds(near) == pytest.approx((inside + crossing) / 100)
    assert traffic(PROGRAM, 8).seconds(far) == pytest.approx(inside / 100 + crossing / 10)


def test_links_of_chips():
    h100 = links_of(CHIPS["h100"])
    assert h100.rate(tuple(range(8))) == 0.8 * 450e9
    assert h100.rate((0, 8)) == 0.8 * 50e9
    assert links_of(CHIPS["v5e"]).rate(tuple(range(256))) == 0.8 * 100e9


def test_a_program_of_one_device_sends_nothing():
    assert traffic("HloModule m\n\nENTRY %main (x: f32[]) -> f32[] {\n}\n", 1).bytes == 0


# As libtpu writes a gather that runs beside two products: its parts share a chain, and as in every
# program of `jax.shard_map` all channels are 1.
CHAINS = """HloModule step

%start (p: f32[4]) -> f32[16] {{
  ROOT %g.1 = f32[16]{{0}} all-gather(%p), channel_id=1, {group}, {attributes}={{chain_id="0"}}
}}

%piece (p: f32[4]) -> f32[16] {{
  ROOT %g.2 = f32[16]{{0}} all-gather(%p), channel_id=1, {group}, {attributes}={{chain_id="0"}}
}}

%other (p: f32[4]) -> f32[16] {{
  ROOT %g.3 = f32[16]{{0}} all-gather(%p), channel_id=1, {group}, {attributes}={{chain_id="1"}}
}}

ENTRY %main (p: f32[4]) -> f32[16] {{
  %f.1 = f32[16]{{0}} fusion(%p), kind=kCustom, calls=%start
  %f.2 = f32[16]{{0}} fusion(%p), kind=kCustom, calls=%piece
  %f.3 = f32[16]{{0}} fusion(%p), kind=kCustom, calls=%other
  %r.1 = f32[16]{{0}} all-reduce(%f.1), channel_id=1, {group}, to_apply=%add
  %r.2 = f32[16]{{0}} all-reduce(%f.2), channel_id=1, {group}, to_apply=%add
}}
""".format(group="replica_groups={{0,1,2,3}}", attributes="frontend_attributes")


def test_collectives_of_one_channel_are_told_apart():
    found = traffic(CHAINS, 4)
    assert [c.kind for c in found.collectives] == ["all-gather"] * 2 + ["all-reduce"] * 2
    assert found.understood.is_all


@pytest.mark.parametrize("operation", ["ragged-all-to-all", "collective-broadcast", "send"])
def test_what_is_sent_and_not_counted_is_said(operation):
    changed = CHAINS.replace("all-reduce(%f.1)", f"{operation}(%f.1)")
    understood = traffic(changed, 4).understood
    assert understood.of - understood.lines == 1


def test_what_goes_to_the_host_is_no_traffic_between_devices():
    sent = CHAINS.replace("all-reduce(%f.1)", "send(%f.1), is_host_transfer=true")
    assert traffic(sent, 4).understood.is_all


def test_a_branch_is_followed_however_it_is_written():
    branch = "%c.1 = f32[16] conditional(%p, %x, %x), true_computation=%start, false_computation=%x"
    text = CHAINS.replace("%f.1 = f32[16]{0} fusion(%p), kind=kCustom, calls=%start", branch)
    assert len(traffic(text, 4).collectives) == 5  # the start stands in no fusion now
