"""`Finding`: one line about a plan that does nothing, and its cure. Standard library only."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """A plan, or a part of it, that does nothing.

    Attributes:
      code: `dots-save-nothing`, `tag-on-output`, `tag-not-needed`, `remat-undone`,
        `peak-not-below-none` or `head-sets-peak`.
      message: One line: what was found, and what to do.
    """

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"
