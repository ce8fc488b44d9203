"""The rates that the planner reckons with on a target."""

import jax

from jaxckpt.memory.chips import CHIPS, Chip
from jaxckpt.memory.roofline import Rates
from jaxckpt.memory.targets import Target

# On a CPU bytes cost nothing here: elementwise work is bound by arithmetic there, of which a
# roofline knows nothing, so plans are put in order by their matrix products alone.
_CPU = Rates(flops_per_second=1e11, bytes_per_second=1e15, host_bytes_per_second=1e15)


def rates_of(target: Target) -> Rates:
    """Returns the rates of a target; of this process's chip by its name, if it is known."""
    chip = chip_of(target)
    return _CPU if chip is None else Rates.of_chip(chip)


def chip_of(target: Target) -> Chip | None:
    """Returns a target's chip, this process's for `local`; None if it is not known."""
    return target.chip if target.backend != "local" else _local_chip()


def _local_chip() -> Chip | None:
    """Returns the table's chip whose name is in the device's (`NVIDIA H100 80GB`, `TPU v5e`)."""
    kind = jax.local_devices()[0].device_kind.lower().replace(" lite", "e")
    names = [name for name in CHIPS if name.partition("-")[0] in kind]
    return CHIPS[max(names, key=len)] if names else None
