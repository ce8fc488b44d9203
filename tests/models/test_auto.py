"""What `auto` is on each chip: pure choices, their reasons, and refusals in one line."""

import dataclasses
import subprocess
import sys

import pytest

from experiments.config import TrainConfig
from experiments.training.step import resolve_model
from jaxckpt.models import TransformerConfig
from jaxckpt.models.config import ModelError
from jaxckpt.models.device_choice import Device, choose_attention, device_of, resolve
from jaxckpt.targets.target import TargetError
from tests.memory.kernels import trace_cudnn

QWEN = TransformerConfig(
    num_blocks=28, d_model=1024, num_heads=16, num_kv_heads=8, head_dim=128, d_ff=3072
)


def choice(target: str, *, seq_len: int = 1024, packed: bool = False, **changes):
    config = dataclasses.replace(QWEN, **changes)
    found = resolve(config, target, seq_len=seq_len, packed=packed)
    return found.config.attention, found.config.dtype, found.why


CHOICES = [
    ("h100", "cudnn", "bfloat16", "attention cudnn: the flash kernel of h100"),
    ("a100-80g", "cudnn", "bfloat16", "attention cudnn: the flash kernel of a100-80g"),
    ("l4", "cudnn", "bfloat16", "attention cudnn: the flash kernel of l4"),
    ("h100-8", "cudnn", "bfloat16", "attention cudnn: the flash kernel of h100-8"),
    (
        "t4",
        "chunked",
        "float16",
        "attention chunked: cudnn needs compute capability 8.0, t4 has 7.5",
    ),
    ("v5e-1", "splash", "bfloat16", "attention splash: the flash kernel of v5e-1"),
    ("v6e-1", "splash", "bfloat16", "attention splash: the flash kernel of v6e-1"),
    ("v3-8", "plain", "bfloat16", "attention plain: splash is for TPU v4 and newer, not for v3-8"),
    ("v5e-4", "plain", "bfloat16", "attention plain: splash runs on one device, v5e-4 has 4"),
    ("local", "plain", "float32", "attention plain: no flash kernel runs on the CPU"),
]


@pytest.mark.parametrize("target, kind, dtype, why", CHOICES)
def test_auto_of_each_chip(target, kind, dtype, why):
    found = choice(target)
    assert found[:2] == (kind, dtype)
    assert found[2][0] == why and found[2][1].startswith(f"dtype {dtype}: ")


SIZES = [
    ("h100", {"head_dim": 20}, "cudnn takes a head_dim that is a multiple of 8, up to 128, not 20"),
    ("h100", {"head_dim": 256}, "a multiple of 8, up to 128, not 256"),
    ("h100", {"dtype": "f32"}, "cudnn takes bfloat16 and float16, not float32"),
    (
        "h100",
        {"seq_len": 1001, "packed": True},
        "packed documents in rows of even length, not 1001",
    ),
    ("v5e-1", {"seq_len": 1000}, "splash takes a seq_len that is a multiple of 128, not 1000"),
]


@pytest.mark.parametrize("target, changes, why", SIZES)
def test_sizes_that_a_kernel_does_not_take(target, changes, why):
    kind, _, reasons = choice(target, **changes)
    assert kind == "plain" and reasons[0].startswith("attention plain: ") and why in reasons[0]
    named = "cudnn" if target == "h100" else "splash"
    with pytest.raises(ValueError, match=why.removeprefix(f"{named} ")) as error:
        choice(target, attention=named, **changes)
    assert "\n" not in str(error.value) and str(error.value).endswith(
        "; valid: auto, chunked, plain"
    )


NAMED = [
    ("v5e-1", "cudnn", "attention 'cudnn' is for NVIDIA GPUs, not for v5e-1; valid: auto, splash,"),
    (
        "local",
        "cudnn",
        "attention 'cudnn' is for NVIDIA GPUs, not for the CPU; valid: auto, chunked, plain",
    ),
    (
        "h100",
        "splash",
        "attention 'splash' is for TPUs, not for h100; valid: auto, cudnn, chunked, plain",
    ),
    ("t4", "cudnn", "needs compute capability 8.0, t4 has 7.5; valid: auto, chunked, plain"),
    ("v2-8", "splash", "is for TPU v4 and newer, not for v2-8; valid: auto, chunked, plain"),
]


@pytest.mark.parametrize("target, kind, message", NAMED)
def test_a_named_kernel_that_the_chip_does_not_run(target, kind, message):
    with pytest.raises(ValueError, match=message):
        choice(target, attention=kind)


def test_what_is_named_stays():
    assert choice("h100", attention="plain", dtype="f32")[:2] == ("plain", "float32")
    assert choice("t4", dtype="bf16") == (
        "chunked",
        "bfloat16",
        (
            "attention chunked: cudnn needs compute capability 8.0, t4 has 7.5",
            "dtype bfloat16: as given",
        ),
    )
    with pytest.raises(TargetError, match=r"target 'h10' is not known"):
        choice("h10")


def test_other_chips_of_this_process():
    amd = Device(name="AMD Instinct MI300X", platform="gpu")
    sizes = {"dtype": "bfloat16", "head_dim": 128, "seq_len": 1024}
    kind, why = choose_attention(amd, **sizes)
    assert kind == "plain" and why.endswith("cudnn is for NVIDIA GPUs, not for AMD Instinct MI300X")
    assert choose_attention(Device(name="TPU v5 lite", platform="tpu"), **sizes)[0] == "splash"
    assert choose_attention(Device(name="TPU v3", platform="tpu"), **sizes)[0] == "plain"
    assert device_of("h200") == Device(name="h200", platform="gpu", compute_capability=(9, 0))


@pytest.mark.parametrize("changes", [{"attention": "flash"}, {"dtype": "fp8"}])
def test_unknown_words(changes):
    ((name, word),) = changes.items()
    with pytest.raises(ValueError, match=f"{name} is '{word}'; valid: auto, "):
        dataclasses.replace(QWEN, **changes)


def test_an_absent_chip_is_resolved_without_jax():
    code = (
        "import sys\n"
        "from jaxckpt.models import TransformerConfig\n"
        "from jaxckpt.models.device_choice import resolve\n"
        "config = TransformerConfig(head_dim=128)\n"
        "print(resolve(config, 'h100', seq_len=512).config.attention, 'jax' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "cudnn False\n", done.stderr


H100 = Device(name="NVIDIA H100", platform="gpu", compute_capability=(9, 0))


def test_a_model_that_nobody_resolved_takes_the_chip_of_this_process(monkeypatch):
    import jax

    from jaxckpt.models import device_choice
    from tests.models import steps

    def traced():
        step, args, _ = steps.gradients("full")
        return str(jax.make_jaxpr(step)(*args)), args[0]

    here, _ = traced()
    assert "bf16" not in here
    trace_cudnn(monkeypatch)
    monkeypatch.setattr(device_choice, "local_device", lambda: H100)
    there, params = traced()
    assert there.count("dot_product_attention_fwd_wrapper[") == 2
    assert "bf16[2,1024,256]" in there
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def test_a_training_configuration_is_resolved_for_a_target():
    config = TrainConfig(model=QWEN, seq_len=1024)
    found, why = resolve_model(config, "v5e-1")
    assert (found.model.attention, found.model.dtype) == ("splash", "bfloat16")
    assert why[0] == "attention splash: the flash kernel of v5e-1"
    assert resolve_model(found, "v5e-1")[0] == found
    with pytest.raises(ModelError, match="attention 'splash' is for TPUs, not for h100"):
        resolve_model(found, "h100")
