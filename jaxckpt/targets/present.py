"""The chip of this process: which one it is, and what a program may fill of its memory.

`chip_of_device` compares a device's kind with those of the chip table, whole: an L40S is no L4, and
a T400 no T4. A kind that is not in the table has no chip, whatever it resembles. JAX is imported
for the chip of this process alone.
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
    bare = lambda kind: kind.removeprefix("NVIDIA ")  # which older drivers leave out
    found = (c for c in CHIPS.values() if bare(device_kind) in map(bare, c.kinds))
    return next(found, None)


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
