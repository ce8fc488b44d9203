"""Whole steps compiled for absent slices: a device's share, its kernels, what it sends."""

import dataclasses

import pytest

from experiments.config import TrainConfig
from experiments.training.build import entry_of
from jaxckpt.absent import launch
from jaxckpt.absent.jobs import measure_entry
from jaxckpt.models import TransformerConfig
from jaxckpt.targets.target import parse_target

MODEL = TransformerConfig(
    **{"num_blocks": 4, "d_model": 256, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64},
    **{"d_ff": 512, "vocab_size": 1024},
)
CONFIG = TrainConfig(model=MODEL, batch_size=8, seq_len=512, remat="attention", unroll=1)


@pytest.mark.heavy
@pytest.mark.xdist_group("absent")
@pytest.mark.parametrize(
    "target, mesh", [("h100-8", "data=2,fsdp=2,tensor=2"), ("v5e-4", "fsdp=4")]
)
def test_a_slice_by_its_devices_share(target, mesh, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))
    try:
        launch.check_available(parse_target(target))
    except launch.Unavailable as error:
        pytest.skip(str(error))
    config = dataclasses.replace(CONFIG, mesh=mesh)
    report = measure_entry(entry_of(config, target), target)
    one = target.partition("-")[0] + ("-1" if target.startswith("v5e") else "")
    alone = measure_entry(entry_of(CONFIG, one), one)
    count = parse_target(target).num_devices
    assert report.num_devices == count and alone.num_devices == 1
    # Parameters and optimizer are cut over fsdp and tensor; scales are whole, and small.
    shares = config.mesh_shape.fsdp * config.mesh_shape.tensor
    assert alone.argument_bytes / shares <= report.argument_bytes
    assert report.argument_bytes < 1.05 * alone.argument_bytes / shares
    assert report.temp_bytes < alone.temp_bytes / 2
    assert report.flops == alone.flops, "of all devices"
    assert 0 < report.collective_seconds < report.estimated_seconds
    assert alone.estimated_seconds / count < report.estimated_seconds < alone.estimated_seconds
