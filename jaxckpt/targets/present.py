"""The chip of this process: which chip it is, and how much of its memory a program may fill.

`chip_of_device` looks up a device's kind in the chip table by the whole name: an L40S is no L4, and
a T400 no T4. A kind that is not in the table has no chip. JAX is imported only for the chip of this
process.
"""

from jaxckpt.targets.chips import CHIPS, Chip
from jaxckpt.targets.target import Target


def chip_of_device(device_kind: str) -> Chip | None:
    """Returns the chip that a JAX device's `device_kind` names; None if it is not in the table.

    Example:
      >>> chip_of_device("NVIDIA H100 80GB HBM3"), chip_of_device("TPU v5 lite")
      (<Chip h100>, <Chip v5e>)
      >>> chip_of_device("cpu") is None
      True
    """
    bare = lambda kind: kind.removeprefix("NVIDIA ")  # older drivers leave this word out
    found = (c for c in CHIPS.values() if bare(device_kind) in map(bare, c.kinds))
    return next(found, None)


def chip_of(target: Target) -> Chip | None:
    """Returns a target's chip (this process's chip for `local`); None if it is unknown."""
    if target.backend != "local":
        return target.chip
    import jax

    return chip_of_device(jax.local_devices()[0].device_kind)


def usable_bytes(target: Target) -> int | None:
    """Returns the bytes that a program may fill of a target's device; None if unknown."""
    if target.backend != "local":
        return target.usable_bytes
    import jax

    try:
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    except (RuntimeError, NotImplementedError):  # the backend has no statistics
        return None
