"""The attention kernel and dtype that `auto` in a model's configuration means on a chip.

    resolve(config, "v5e-1", seq_len=1024).config.attention     # 'splash'

The choice follows the step's target, which may differ from the backend of the tracing process. So a
step for an absent chip is built from a resolved configuration. A model that is traced with `auto`
uses the chip of this process. JAX is imported only for `local`.

Limits: XLA does not partition a Pallas kernel. A `Layout` (`sharding.py`) runs it on each device's
own part; without one, `splash` is for a single device.
"""

import dataclasses
import functools
import re

from jaxckpt.models.config import ATTENTION_KINDS, ModelError, TransformerConfig
from jaxckpt.targets.gpu_config import compute_capability
from jaxckpt.targets.target import Target, parse_target

# Block sizes: multiples of the kernel's 128 lanes. Larger blocks read keys and values less often.
_SPLASH_BLOCKS = (512, 384, 256, 128)
_FLASH_CAPABILITY = (8, 0)  # Ampere: flash attention of cuDNN, and units for bfloat16
_HALF_CAPABILITY = (7, 0)  # Volta: units for float16
_OLD_TPU = re.compile(r"\bv[23]\b")  # Pallas kernels cannot use bfloat16 in their matrix units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """The facts of a device that decide which kernels and dtypes it runs.

    Attributes:
      name: The name for messages: `h100`, `TPU v5 lite`.
      platform: `"cpu"`, `"gpu"` or `"tpu"`.
      compute_capability: NVIDIA's number, such as `(9, 0)`; None for other devices.
      num_devices: The number of devices that one program is spread over.
    """

    name: str
    platform: str
    compute_capability: tuple[int, int] | None = None
    num_devices: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved:
    """A configuration without `auto`, and one line for each choice."""

    config: TransformerConfig
    why: tuple[str, ...]


def resolve(
    config: TransformerConfig,
    target: str | Target,
    *,
    seq_len: int,
    packed: bool = False,
    spread: bool = False,
) -> Resolved:
    """Returns a configuration with `auto` replaced by the kernel and dtype for a target.

    Args:
      config: A configuration; a kernel or dtype that it names is not changed.
      target: `"local"`, or a chip, present or absent.
      seq_len: The number of tokens per sequence.
      packed: Whether sequences hold several documents.
      spread: Whether a `Layout` runs kernels on each device's own part.

    Returns:
      A `Resolved`: the configuration, and the reason for each choice.

    Raises:
      TargetError: The target is unknown.
      ModelError: `config` names a kernel that does not run on the target or with the sizes.

    Example:
      >>> resolve(TransformerConfig(head_dim=128), "v5e-1", seq_len=1024).config.attention
      'splash'
    """
    device = device_of(target)
    if spread:
        device = dataclasses.replace(device, num_devices=1)
    dtype, dtype_why = choose_dtype(device)
    if config.dtype != "auto":
        dtype, dtype_why = config.dtype, f"dtype {config.dtype}: as given"
    sizes = {"dtype": dtype, "head_dim": config.head_dim, "seq_len": seq_len, "packed": packed}
    if config.attention == "auto":
        kind, why = choose_attention(device, **sizes)
    else:
        kind, why = config.attention, f"attention {config.attention}: as given"
        reason = _refused_device(kind, device) or refused_sizes(kind, **sizes)
        if reason:
            takes = lambda one: one != kind and not _refused_device(one, device)
            others = list(filter(takes, ATTENTION_KINDS[1:]))
            raise ModelError(f"attention {kind!r} {reason}; valid: auto, {', '.join(others)}")
    resolved = dataclasses.replace(config, attention=kind, dtype=dtype)
    return Resolved(config=resolved, why=(why, dtype_why))


def choose_dtype(device: Device) -> tuple[str, str]:
    """Returns the dtype that a chip computes fastest in, and a line that says why."""
    capability = device.compute_capability or (0, 0)
    if device.platform == "tpu" or capability >= _FLASH_CAPABILITY:
        return "bfloat16", f"dtype bfloat16: {device.name} multiplies in it"
    if capability >= _HALF_CAPABILITY:
        return "float16", f"dtype float16: {device.name} multiplies in it, and not in bfloat16"
    return "float32", f"dtype float32: {device.name} has no units for bfloat16"


def choose_attention(
    device: Device, *, dtype: str, head_dim: int, seq_len: int, packed: bool = False
) -> tuple[str, str]:
    """Returns the attention kernel for a chip and sizes, and a line that says why."""
    sizes = {"dtype": dtype, "head_dim": head_dim, "seq_len": seq_len, "packed": packed}
    best = {"gpu": "cudnn", "tpu": "splash"}.get(device.platform)
    if best is None:
        return "plain", f"attention plain: no flash kernel runs on {device.name}"
    reason = _refused_device(best, device)
    if reason and device.compute_capability is not None:
        return "chunked", f"attention chunked: {best} {reason}"
    reason = reason or refused_sizes(best, **sizes)
    if reason:
        return "plain", f"attention plain: {best} {reason}"
    return best, f"attention {best}: the flash kernel of {device.name}"


def refused_sizes(
    kind: str, *, dtype: str, head_dim: int, seq_len: int, packed: bool = False
) -> str | None:
    """Returns a text on the size that a kernel does not take; None if it takes all sizes."""
    if kind == "cudnn":
        if dtype not in ("bfloat16", "float16"):
            return f"takes bfloat16 and float16, not {dtype}"
        if head_dim % 8 or head_dim > 128:
            return f"takes a head_dim that is a multiple of 8, up to 128, not {head_dim}"
        if packed and seq_len % 2:
            return f"takes packed documents in rows of even length, not {seq_len}"
    if kind == "splash":
        if dtype not in ("bfloat16", "float32"):
            return f"takes bfloat16 and float32, not {dtype}"
        if splash_block(seq_len) is None:
            return f"takes a seq_len that is a multiple of 128, not {seq_len}"
    return None


def splash_block(seq_len: int) -> int | None:
    """Returns the splash kernel's block size for a length; None if no block size divides it."""
    return next((block for block in _SPLASH_BLOCKS if seq_len % block == 0), None)


def device_of(target: str | Target) -> Device:
    """Returns the device of a target.

    Raises:
      TargetError: The target is unknown.
    """
    target = parse_target(target)
    if target.backend == "local":
        return local_device()
    return Device(
        name=target.name,
        platform={"cuda": "gpu"}.get(target.backend, target.backend),
        compute_capability=compute_capability(target.known_chip),
        num_devices=target.num_devices,
    )


@functools.cache
def local_device() -> Device:
    """Returns the first device of this process, on which a program without a mesh runs."""
    import jax

    device = jax.devices()[0]
    found = str(getattr(device, "compute_capability", "")).split(".")
    is_nvidia = device.platform == "gpu" and len(found) == 2 and "".join(found).isdecimal()
    return Device(
        name="the CPU" if device.platform == "cpu" else device.device_kind,
        platform=device.platform,
        compute_capability=(int(found[0]), int(found[1])) if is_nvidia else None,
    )


def _refused_device(kind: str, device: Device) -> str | None:
    """Returns the reason why a chip does not run a kernel; None if it does."""
    if kind == "cudnn":
        capability = device.compute_capability
        if capability is None:
            return f"is for NVIDIA GPUs, not for {device.name}"
        if capability < _FLASH_CAPABILITY:
            number = ".".join(map(str, capability))
            return f"needs compute capability 8.0, {device.name} has {number}"
    if kind == "splash":
        if device.platform != "tpu":
            return f"is for TPUs, not for {device.name}"
        if _OLD_TPU.search(device.name):
            return f"is for TPU v4 and newer, not for {device.name}"
        if device.num_devices > 1:
            return f"runs on one device, {device.name} has {device.num_devices}"
    return None
