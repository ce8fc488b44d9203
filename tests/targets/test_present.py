"""Which chip a device is: by its whole kind, and the same for everyone who asks."""

import types

import jax
import pytest

from jaxckpt.compiled import peak
from jaxckpt.costs.roofline import Rates, rates_of
from jaxckpt.memory import measure
from jaxckpt.targets import present
from jaxckpt.targets.chips import CHIPS
from jaxckpt.targets.present import chip_of, chip_of_device, usable_bytes
from jaxckpt.targets.target import LOCAL, parse_target

# Every chip of the table has a kind here; beside each stand its likenesses.
KINDS = {
    "TPU v2": "v2",
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v4 lite": None,
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU7": None,
    "Tesla T4": "t4",
    "NVIDIA T400": None,
    "NVIDIA T400 4GB": None,
    "NVIDIA T4G": None,
    "NVIDIA L4": "l4",
    "NVIDIA L40": None,
    "NVIDIA L40S": None,
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100-PCIE-40GB": "a100-40g",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100 80GB PCIe": "a100-80g",
    "NVIDIA A100-SXM4-80GB MIG 1g.10gb": None,
    "NVIDIA A100-SXM-64GB": None,
    "NVIDIA A10": None,
    "NVIDIA A10G": None,
    "NVIDIA RTX A4000": None,
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 5090": None,
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": None,
    "NVIDIA H100 NVL": None,
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": None,
    "NVIDIA GH200 480GB": None,
    "NVIDIA B200": "b200",
    "NVIDIA GB200": None,
    "Tesla V100-SXM2-16GB": None,
    "AMD Instinct MI300X": None,
    "cpu": None,
    "": None,
}


@pytest.fixture
def device(monkeypatch):
    """Makes this process's device one of a kind, with memory of its own."""

    def become(kind: str, stats=None):
        made = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)
        monkeypatch.setattr(jax, "local_devices", lambda: [made])

    return become


@pytest.mark.parametrize(("kind", "name"), KINDS.items())
def test_a_device_is_the_chip_of_its_whole_kind(kind, name, device):
    expected = None if name is None else CHIPS[name]
    assert chip_of_device(kind) is expected
    device(kind)
    assert chip_of(LOCAL) is expected
    assert rates_of(LOCAL) == (None if expected is None else Rates.of_chip(expected))


def test_every_chip_of_the_table_is_told():
    assert {name for name in KINDS.values() if name} == CHIPS.keys()


def test_nobody_else_reads_what_kind_a_device_is():
    """Reports, the planner and the trainer ask the one function."""
    from experiments.training import loop
    from jaxckpt.planner import fit

    assert loop.chip_of is fit.chip_of is present.chip_of and peak.present is present
    assert fit.rates_of is measure.rates_of is rates_of


def test_what_a_program_may_fill(device):
    assert usable_bytes(parse_target("v5e-1")) == CHIPS["v5e"].usable_bytes
    device("NVIDIA L40S", {"bytes_limit": 7})
    assert usable_bytes(LOCAL) == 7
    for silent in (None, {}):
        device("cpu", silent)
        assert usable_bytes(LOCAL) is None


def test_an_absent_chip_is_its_targets():
    assert chip_of(parse_target("h100-8")) is CHIPS["h100"]
    assert rates_of(parse_target("rtx4090")) == Rates.of_chip(CHIPS["rtx4090"])
