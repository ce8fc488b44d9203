"""The chip of this process: which one it is, and what a program may fill of its memory.

Everyone who asks which chip a device is asks `chip_of_device`. A device's kind is compared whole:
an L40S is no L4, and a T400 no T4. A kind that is not in the table has no chip, whatever it
resembles. JAX is imported for the chip of this process alone.
"""

from jaxckpt.targets.chips import CHIPS, Chip
from jaxckpt.targets.target import Target

# What JAX calls a device (without "NVIDIA ", which older drivers leave out), by the chip it is.
# Boards with other memory or clocks (H100 PCIe, NVL, laptops, MIG slices) are in no row.
_DEVICE_KINDS = {
    "v2": ("TPU v2",),
    "v3": ("TPU v3",),
    "v4": ("TPU v4",),
    "v5e": ("TPU v5 lite", "TPU v5e"),
    "v5p": ("TPU v5", "TPU v5p"),
    "v6e": ("TPU v6 lite", "TPU v6e"),
    "tpu7x": ("TPU7x",),
    "t4": ("Tesla T4",),
    "l4": ("L4",),
    "a100-40g": ("A100-SXM4-40GB", "A100-PCIE-40GB"),
    "a100-80g": ("A100-SXM4-80GB", "A100 80GB PCIe"),
    "rtx4090": ("GeForce RTX 4090",),
    "h100": ("H100 80GB HBM3",),
    "h200": ("H200",),
    "b200": ("B200",),
}
_CHIPS = {kind: CHIPS[name] for name, kinds in _DEVICE_KINDS.items() for kind in kinds}


def chip_of_device(device_kind: str) -> Chip | None:
    """Returns the chip that a JAX device's `device_kind` names; None if it is not in the table.

    Example:
      >>> chip_of_device("NVIDIA H100 80GB HBM3"), chip_of_device("TPU v5 lite")
      (<Chip h100>, <Chip v5e>)
      >>> chip_of_device("cpu") is None
      True
    """
    return _CHIPS.get(device_kind.removeprefix("NVIDIA "))


def chip_of(target: Target) -> Chip | None:
    """Returns a target's chip, this process's for `local`; None if it is not known."""
    if target.backend != "local":
        return target.chip
    import jax

    return chip_of_device(jax.local_devices()[0].device_kind)


def usable_bytes(target: Target) -> int | None:
    """Returns what a program may fill of one device of a target; None if the backend is silent."""
    if target.backend != "local":
        return target.usable_bytes
    import jax

    try:
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    except (RuntimeError, NotImplementedError):  # a backend without statistics
        return None
