"""Checks the budgets and numbers of blocks that a user gives to `fit`; turns budgets into bytes."""

import warnings
from collections.abc import Mapping

from jaxckpt.plans.errors import check_count
from jaxckpt.targets.present import usable_bytes
from jaxckpt.targets.target import Target
from jaxckpt.units import iec, parse_bytes


def check_asked(num_blocks: int | Mapping[str, int] | None):
    """Raises unless `num_blocks` is valid.

    Args:
      num_blocks: The number of blocks of one stack, or a mapping from stack names to numbers; None
        if tracing finds the number.

    Raises:
      ValueError: A number is not a positive whole number, or the mapping is empty or has a name
        that is not a non-empty string.
    """
    if num_blocks is None:
        return
    if isinstance(num_blocks, Mapping):
        if not num_blocks or not all(isinstance(name, str) and name for name in num_blocks):
            raise ValueError(
                f"num_blocks is {dict(num_blocks)!r}; several stacks are given by name, such as "
                "{'encoder': 12, 'decoder': 24}"
            )
        for name, count in num_blocks.items():
            check_count(f"num_blocks[{name!r}]", count, " of blocks")
    else:
        check_count("num_blocks", num_blocks, " of blocks")


def budget_bytes(budget: str | int | float, target: Target) -> int:
    """Returns a budget in bytes; warns if a program cannot fill so much of the target's memory.

    Args:
      budget: Bytes per device, such as `"15GiB"`, or `"auto"` for all usable memory.
      target: The target whose memory the budget is for.

    Raises:
      ValueError: The budget is not a size, or it is `"auto"` and the target's memory is not known.
    """
    if budget == "auto":
        usable = usable_bytes(target)
        if usable is None:
            raise ValueError(
                f"budget 'auto' is what the target can use, which {target} does not tell; "
                "give bytes, such as 15GiB, or a chip, such as target='v5e-1'"
            )
        return usable
    size = given_bytes(budget)
    excess = more_than_usable(size, target)
    if excess is not None:
        warnings.warn(excess, stacklevel=3)
    return size


def host_bytes(host_budget: str | int | float) -> int:
    """Returns the bytes of host memory that a plan may use.

    Args:
      host_budget: Bytes per device, such as `"32GiB"`; 0 for no host memory.

    Raises:
      ValueError: `host_budget` is not a size.
    """
    if host_budget == 0 or host_budget == "0":
        return 0
    try:
        return parse_bytes(host_budget)
    except ValueError as error:
        raise ValueError(f"host_budget: {error}") from None


def given_bytes(budget: str | int | float) -> int:
    """Returns the bytes of a budget that is not `"auto"`.

    Raises:
      ValueError: The budget is not a size.
    """
    try:
        return parse_bytes(budget)
    except ValueError as error:
        raise ValueError(f"budget: {error}") from None


def more_than_usable(size: int, target: Target) -> str | None:
    """Returns a warning if a program cannot fill `size` bytes of the target's memory, else None."""
    usable = usable_bytes(target)
    if usable is None or size <= usable:
        return None
    return (
        f"the budget of {iec(size)} is more than the {iec(usable)} that a program may fill "
        f"of {target}"
    )
