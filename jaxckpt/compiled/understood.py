"""How much of a text that promises no form was understood. No JAX import."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Understood:
    """How many lines of a compiler's text were understood, of how many that were read.

    Attributes:
      lines: Lines that were understood.
      of: Lines that were read, but for blank ones and those that no figure comes from.
    """

    lines: int = 0
    of: int = 0

    def __add__(self, other: "Understood") -> "Understood":
        return Understood(self.lines + other.lines, self.of + other.of)

    @property
    def is_all(self) -> bool:
        """Whether nothing was left out."""
        return self.lines == self.of

    def __str__(self) -> str:
        return f"understood {self.lines} of {self.of} lines of XLA's text"


NOTHING_READ = Understood()
