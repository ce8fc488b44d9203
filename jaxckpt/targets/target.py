"""Targets: the chip, present or not, that a step is compiled for. Standard library only.

    parse_target("v5e-4").topology      # 'v5e:2x2'
    parse_target("a100-80g-8").num_devices

A target is `local`, a TPU slice by its Google Cloud name (`v5e-1`, `v5p-8`, `tpu7x-8`; `chips.py`
says what the number counts), or one or more NVIDIA GPUs (`h100`, `h100-8`; hosts have eight, so the
next is `h100-16`). A step's memory is per device.
"""

import dataclasses

from jaxckpt.plans.errors import UserError, nearest
from jaxckpt.targets.chips import CHIPS, Chip

HOST_GPUS = 8
_MAX_HOSTS = 128


class TargetError(UserError, ValueError):
    """A target that does not exist: one line with what was given, what is valid, a guess."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The chip, or chips, that a step is compiled for.

    Attributes:
      name: The text that names it: `v5e-4`.
      backend: `"local"` (the backend of this process), `"tpu"` or `"cuda"`.
      chip: The chip's figures; None for `local`.
      num_devices: The number of JAX devices that a program may spread over.
      topology: libtpu's name of a TPU slice, `v5e:2x2`; None for other targets.
    """

    name: str
    backend: str
    chip: Chip | None = None
    num_devices: int = 1
    topology: str | None = None

    @property
    def usable_bytes(self) -> int | None:
        """The bytes that a program may fill of one device; None for `local`."""
        return None if self.chip is None else self.chip.usable_bytes

    @property
    def known_chip(self) -> Chip:
        """The chip of a target that is not `local`."""
        assert self.chip is not None, self.name
        return self.chip

    def __str__(self) -> str:
        return self.name


LOCAL = Target(name="local", backend="local")


def parse_target(text: "str | Target") -> Target:
    """Returns the target that a text names.

    Raises:
      TargetError: The chip is unknown, or has no such slice.

    Example:
      >>> parse_target("v5p-8").num_devices, parse_target("h100").chip.bf16_flops_per_second
      (4, 989400000000000.0)
    """
    if isinstance(text, Target):
        return text
    if not isinstance(text, str):
        raise TargetError(f"target {text!r} is not text; valid: {_examples()}")
    if text == "local":
        return LOCAL
    chip, number = _split(text)
    if chip is None:
        begun = [name for name in names() if name.startswith(f"{text}-")]
        guess = nearest(text, begun[:1] or names())
        raise TargetError(f"target {text!r} is not known{guess}; valid: {_examples()}")
    return _tpu(text, chip, number) if chip.backend == "tpu" else _cuda(text, chip, number)


def names() -> tuple[str, ...]:
    """Returns every target: `local`, each TPU slice, each GPU alone and in eights."""
    found = ["local"]
    for chip in CHIPS.values():
        found += [f"{chip.name}-{one.number}" for one in chip.slices]
        found += [] if chip.slices else [chip.name, f"{chip.name}-{HOST_GPUS}"]
    return tuple(found)


def _examples() -> str:
    small = [f"{c.name}-{c.slices[0].number}" if c.slices else c.name for c in CHIPS.values()]
    return ", ".join(["local", *small])


def _split(text: str) -> tuple[Chip | None, str | None]:
    """Returns the chip and the text after its dash; the longest name wins (`a100-80g`)."""
    for name in sorted(CHIPS, key=len, reverse=True):
        if text == name:
            return CHIPS[name], None
        if text.startswith(f"{name}-"):
            return CHIPS[name], text.removeprefix(f"{name}-")
    return None, None


def _tpu(text: str, chip: Chip, number: str | None) -> Target:
    for one in chip.slices:
        if number == str(one.number):
            found = Target(name=text, backend="tpu", chip=chip, num_devices=one.num_devices)
            return dataclasses.replace(found, topology=f"{chip.name}:{one.topology}")
    counts = "chips" if chip.slices[0].number == 1 else "cores, two a chip"
    valid = ", ".join(f"{chip.name}-{one.number}" for one in chip.slices)
    raise TargetError(
        f"target {text!r} is no {chip.name} slice (it counts {counts}); valid: {valid}"
    )


def _cuda(text: str, chip: Chip, number: str | None) -> Target:
    count = 1 if number is None else int(number) if number.isdecimal() else 0
    hosts, rest = divmod(count, HOST_GPUS)
    most_hosts = _MAX_HOSTS if chip.network_bytes_per_second else 1
    if not (1 <= count <= HOST_GPUS or (rest == 0 and 1 <= hosts <= most_hosts)):
        valid = f"{chip.name}, {chip.name}-2 to {chip.name}-{HOST_GPUS}"
        if most_hosts > 1:
            valid += f", {chip.name}-{2 * HOST_GPUS} and so on in hosts of {HOST_GPUS}"
        else:
            valid += ", which is one host"
        raise TargetError(f"target {text!r} is no number of GPUs that hosts have; valid: {valid}")
    return Target(name=text, backend="cuda", chip=chip, num_devices=count)
