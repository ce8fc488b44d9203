"""Targets: their names, their figures, and what is said of those that do not exist."""

import re
import subprocess
import sys

import pytest

from jaxckpt.targets.chips import CHIPS
from jaxckpt.targets.gpu_config import target_config
from jaxckpt.targets.target import LOCAL, TargetError, names, parse_target
from jaxckpt.units import iec, parse_bytes

GIB = 1 << 30


@pytest.mark.parametrize(
    "name, topology, num_devices",
    [
        ("v5e-1", "v5e:1x1", 1),
        ("v5e-4", "v5e:2x2", 4),
        ("v5e-256", "v5e:16x16", 256),
        ("v6e-8", "v6e:2x4", 8),
        ("v5p-8", "v5p:2x2x1", 4),  # cores: four chips, each one device
        ("v4-16", "v4:2x2x2", 8),
        ("v2-8", "v2:2x2", 8),  # cores: four chips, each two devices
        ("v3-32", "v3:4x4", 32),
        ("tpu7x-8", "tpu7x:2x2x1", 8),
    ],
)
def test_tpu_slices(name, topology, num_devices):
    target = parse_target(name)
    assert (target.name, target.backend) == (name, "tpu")
    assert (target.topology, target.num_devices) == (topology, num_devices)


def test_gpus():
    assert parse_target("h100").num_devices == 1
    target = parse_target("a100-80g-4")
    assert (target.chip.name, target.num_devices, target.topology) == ("a100-80g", 4, None)
    assert parse_target("h100-64").num_devices == 64
    assert parse_target("a100-40g").chip.memory_bytes < parse_target("a100-80g").chip.memory_bytes


def test_every_name_parses_to_itself():
    assert len(set(names())) == len(names()) > 60
    for name in names():
        assert str(parse_target(name)) == name
    assert parse_target("local") is LOCAL and LOCAL.usable_bytes is None
    assert parse_target(parse_target("v5e-1")) == parse_target("v5e-1")


@pytest.mark.parametrize(
    "text, message",
    [
        ("v5e-2", "target 'v5e-2' is no v5e slice (it counts chips); valid: v5e-1, v5e-4, v5e-8,"),
        ("v5p-4", "no v5p slice (it counts cores, two a chip); valid: v5p-8, v5p-16"),
        ("v5e", "valid: v5e-1"),
        ("a100", "(did you mean 'a100-40g'?)"),
        ("h10", "target 'h10' is not known (did you mean 'h100'?); valid: local, v2-8"),
        ("h100-9", "no number of GPUs that hosts have; valid: h100, h100-2 to h100-8, h100-16 and"),
        ("l4-16", "valid: l4, l4-2 to l4-8, which is one host"),
        ("h100-x", "no number of GPUs"),
        ("h100-0", "no number of GPUs"),
        ("", "valid: local"),
        (8, "target 8 is not text"),
    ],
)
def test_what_does_not_exist(text, message):
    with pytest.raises(TargetError, match=re.escape(message)) as error:
        parse_target(text)
    assert "\n" not in str(error.value)


def test_figures_are_of_one_device():
    """Each within a few percent of what its vendor says of a chip, divided by its devices."""
    assert parse_target("v5e-1").usable_bytes == int(15.75 * GIB)
    v3 = CHIPS["v3"]
    assert v3.devices_per_chip == 2 and v3.memory_bytes == 16 * GIB
    assert v3.bf16_flops_per_second == 61.5e12
    assert CHIPS["tpu7x"].bf16_flops_per_second == 1153.5e12
    assert CHIPS["h100"].usable_bytes == CHIPS["h100"].memory_bytes * 3 // 4
    for chip in CHIPS.values():
        assert 0.7 * chip.memory_bytes < chip.usable_bytes < chip.memory_bytes
        assert chip.host_bytes_per_second < chip.memory_bytes_per_second
        assert chip.network_bytes_per_second < chip.interconnect_bytes_per_second
        assert chip.interconnect_bytes_per_second < 0.3 * chip.memory_bytes_per_second
        # FLOPs a byte from 30 (v3) to 600: a slip of a power of ten would leave the range.
        assert 30 < chip.bf16_flops_per_second / chip.memory_bytes_per_second < 600
        assert ("Google Cloud" in chip.source) == (chip.backend == "tpu")
        assert ("NVIDIA" in chip.source) == (chip.backend == "cuda")


def test_gpu_configs_name_their_chip():
    for chip in CHIPS.values():
        if chip.backend == "cuda":
            text = target_config(chip)
            assert f"device_memory_size: {chip.memory_bytes}\n" in text
            assert text.count("{") == text.count("}")
    assert "major: 7 minor: 5" in target_config(CHIPS["t4"])


def test_sizes():
    sizes = ("15GiB", "16GB", "1.5e9", 12345, " 2 mib ", "1_000", 1.5)
    expected = [15 * GIB, 16 * 10**9, 1_500_000_000, 12345, 2 << 20, 1000, 1]
    assert [parse_bytes(size) for size in sizes] == expected
    assert iec(3 * GIB) == "3.00 GiB" and iec(-(GIB // 2)) == "-512.00 MiB"


@pytest.mark.parametrize(
    "size, message",
    [
        ("16GBB", "unit 'GBB' (did you mean 'GB'?); valid: B, KB, KiB"),
        ("lots", "size 'lots' is not a number of bytes; valid: 15GiB"),
        ("-3GB", "is not a number of bytes"),
        ("1.2.3GB", "is not a number of bytes"),
        ("0", "size '0' is not at least one byte"),
        (float("nan"), "is not at least one byte"),
        (True, "is not a number of bytes"),
        (None, "is not a number of bytes"),
    ],
)
def test_what_is_no_size(size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_bytes(size)


def test_targets_and_reports_need_no_jax():
    code = (
        "import sys\n"
        "from jaxckpt.absent import jobs, launch\n"
        "from jaxckpt.compiled import buffers, cache, report\n"
        "from jaxckpt.targets import chips, target\n"
        "target.parse_target('v5e-1')\n"
        "print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
