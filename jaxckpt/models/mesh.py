"""The mesh of devices that a Transformer is spread over, as text and numbers. No JAX import.

    MeshShape.parse("data=2,fsdp=4").size      # 8

The batch is sharded over `data` and `fsdp`. Parameters, their gradients and the optimizer's state
are sharded over `fsdp`, and each parameter is gathered where it is used. Heads, the MLP's width and
the vocabulary are sharded over `tensor`. An axis that is not named has size 1.
"""

import dataclasses
import math

from jaxckpt.losses.sizes import divisors
from jaxckpt.models.config import TransformerConfig
from jaxckpt.plans.errors import UserError, nearest

AXES = ("data", "fsdp", "tensor")
_EXAMPLE = "data=2,fsdp=4,tensor=2"


class MeshError(UserError, ValueError):
    """A mesh is not valid: one line with what was given, what is valid, a guess."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Sizes of the mesh's axes, in the order of `AXES`.

    Attributes:
      data: The number of copies of the model, or of its shards.
      fsdp: The number of shards of every parameter; their devices work on different sequences.
      tensor: The number of parts of every matrix product; their devices work on the same tokens.

    Raises:
      MeshError: A size is below 1.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name in AXES:
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise MeshError(f"mesh axis {name} is {size}; the least is 1")

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Returns the shape that a text such as `data=2,fsdp=4` names; axes in any order.

        Raises:
          MeshError: The text has another form, or names an unknown axis, or an axis twice.

        Example:
          >>> MeshShape.parse("fsdp=4, tensor=2")
          MeshShape(data=1, fsdp=4, tensor=2)
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, equals, size = (piece.strip() for piece in part.partition("="))
            if not equals or not name:
                raise MeshError(f"mesh {text!r}: {part.strip()!r} is no axis=size; as {_EXAMPLE}")
            if name not in AXES:
                raise MeshError(
                    f"mesh {text!r} has no axis {name!r}{nearest(name, AXES)}; valid: "
                    f"{', '.join(AXES)}"
                )
            if name in sizes:
                raise MeshError(f"mesh {text!r} names axis {name} twice")
            if not (size.isascii() and size.isdigit() and len(size) < 10):
                raise MeshError(f"mesh {text!r}: size {size!r} of {name} is no whole number")
            sizes[name] = int(size)
        return cls(**sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes in the order of `AXES`."""
        return dataclasses.astuple(self)

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.sizes)

    @property
    def batch_parts(self) -> int:
        """The number of parts that a batch is sharded into."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(AXES, self.sizes, strict=True))

    def check(self, config: TransformerConfig, batch_size: int, accumulate: int = 1):
        """Raises `MeshError` unless a model and its batch can be sharded this way.

        Args:
          config: The model's configuration.
          batch_size: The number of sequences per step.
          accumulate: The number of parts of an accumulated batch.
        """
        rows = batch_size // accumulate
        if rows % self.batch_parts:
            part = "" if accumulate == 1 else f" in {accumulate} parts of {rows}"
            raise MeshError(
                f"mesh {self}: data times fsdp is {self.batch_parts}, which does not divide "
                f"batch_size {batch_size}{part}; valid: {_listed(rows)}"
            )
        heads, vocab_size = config.num_kv_heads, config.vocab_size
        self._divides("fsdp", d_model=config.d_model)
        self._divides("tensor", num_kv_heads=heads, d_ff=config.d_ff, vocab_size=vocab_size)

    def check_devices(self, count: int, of: str):
        """Raises `MeshError` unless the mesh has `count` devices; `of` says whose they are."""
        if self.size != count:
            devices = "device" if count == 1 else "devices"
            raise MeshError(f"mesh {self} is of {self.size} devices; {of} has {count} {devices}")

    def _divides(self, axis: str, **sizes: int):
        parts = getattr(self, axis)
        common = math.gcd(*sizes.values())
        for name, size in sizes.items():
            if size % parts:
                raise MeshError(
                    f"mesh {self}: {axis} {parts} does not divide {name} {size}; valid: "
                    f"{_listed(common)}"
                )


def _listed(number: int) -> str:
    return ", ".join(map(str, divisors(number)))
