"""What a budget and a target say in numbers: bytes to stay within, rates to reckon with."""

import warnings

import jax

from jaxckpt.memory.chips import CHIPS, Chip
from jaxckpt.memory.roofline import Rates
from jaxckpt.memory.targets import Target
from jaxckpt.memory.units import gib, parse_bytes

# On a CPU bytes cost nothing here: elementwise work is bound by arithmetic there, of which a
# roofline knows nothing, so plans are put in order by their matrix products alone.
_CPU = Rates(flops_per_second=1e11, bytes_per_second=1e15, host_bytes_per_second=1e15)


def budget_bytes(budget: str | int | float, target: Target) -> int:
    """Returns a budget in bytes.

    Warns where it is more than the target has.

    Raises:
      ValueError: No size, or `"auto"` for a target whose memory is not known.
    """
    usable = usable_bytes(target)
    if budget == "auto":
        if usable is None:
            raise ValueError(
                f"budget 'auto' is what the target can use, which {target} does not tell; "
                "give bytes, such as 15GiB, or a chip, such as target='v5e-1'"
            )
        return usable
    try:
        size = parse_bytes(budget)
    except ValueError as error:
        raise ValueError(f"budget: {error}") from None
    if usable is not None and size > usable:
        warnings.warn(
            f"the budget of {gib(size)} is more than the {gib(usable)} that a program may fill "
            f"of {target}",
            stacklevel=3,
        )
    return size


def usable_bytes(target: Target) -> int | None:
    """Returns what a program may fill of one device, or None if nobody says."""
    if target.backend != "local":
        return target.usable_bytes
    try:
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    except (RuntimeError, NotImplementedError):
        return None


def rates_of(target: Target) -> Rates:
    """Returns the rates of a target; of this process's chip by its name, if it is known."""
    chip = target.chip if target.backend != "local" else _local_chip()
    if chip is None:
        return _CPU
    return Rates.of_data_sheet(
        flops_per_second=chip.bf16_flops_per_second,
        bytes_per_second=chip.memory_bytes_per_second,
        host_bytes_per_second=chip.host_bytes_per_second,
    )


def _local_chip() -> Chip | None:
    """Returns the table's chip whose name is in the device's (`NVIDIA H100 80GB`, `TPU v5e`)."""
    kind = jax.local_devices()[0].device_kind.lower().replace(" lite", "e")
    names = [name for name in CHIPS if name.partition("-")[0] in kind]
    return CHIPS[max(names, key=len)] if names else None
