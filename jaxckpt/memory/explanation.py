"""`Explanation`: the residuals of one block as frozen data, and the table that shows them."""

import dataclasses
from collections.abc import Callable

_MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One residual, or the residuals of one attention kernel together.

    Attributes:
      name: The user's tag, `carry` for the block's input, `attention`, or the primitive.
      source: `file.py:123`, the line that makes it; `""` if unknown.
      shape: Of the largest array of the row.
      dtype: Of that array.
      num_arrays: How many arrays the row stands for.
      residual_bytes: Kept without remat; 0 for what only the plan keeps.
      recompute_flops: Matrix-product FLOPs to make it from the block's inputs.
      recompute: The primitives that make it, the last one first, down to an input.
      decision: What the plan does with it: `saved`, `host`, `recomputed`, `saved+host`, `partly
        saved` (of a kernel's arrays), or None without a plan.
      saved_bytes: What the plan keeps of it on the device; None without a plan.
      host_bytes: What the plan keeps of it on the host; None without a plan.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    num_arrays: int
    residual_bytes: int
    recompute_flops: int
    recompute: str
    decision: str | None = None
    saved_bytes: int | None = None
    host_bytes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """The residuals of one block, largest first; `print` shows a table.

    Attributes:
      rows: What the backward pass needs. Parameters and consts of the block are not counted: they
        are in memory anyway and are read again. A cast or transposed copy of them is counted.
      carry_bytes: a, the bytes of the block's input.
      shared_bytes: Bytes of the parameters and consts that the backward pass reads again.
      num_blocks: L, or None if it was not given.
      plan: The plan's text, or None if none was given.
    """

    rows: tuple[Row, ...]
    carry_bytes: int
    shared_bytes: int
    num_blocks: int | None = None
    plan: str | None = None

    @property
    def residual_bytes(self) -> int:
        """R: what a block keeps without remat."""
        return sum(row.residual_bytes for row in self.rows)

    @property
    def ratio(self) -> float:
        """R / a: how many carries a block's residuals weigh."""
        return self.residual_bytes / self.carry_bytes if self.carry_bytes else float("inf")

    @property
    def saved_bytes(self) -> int | None:
        """What a block keeps on the device under the plan, or None without one."""
        return None if self.plan is None else sum(row.saved_bytes or 0 for row in self.rows)

    @property
    def host_bytes(self) -> int | None:
        """What a block keeps on the host under the plan, or None without one."""
        return None if self.plan is None else sum(row.host_bytes or 0 for row in self.rows)

    def __str__(self) -> str:
        return _table(self)


def _table(explanation: Explanation) -> str:
    """Returns the rows, the totals and what is not counted, as text."""
    columns = _columns(explanation)
    lines = [[title for title, _, _ in columns]]
    lines += [[cell(row) for _, _, cell in columns] for row in explanation.rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    sides = [side for _, side, _ in columns]
    text = ["  ".join(map(_pad, line, widths, sides)).rstrip() for line in lines]
    return "\n".join([*text, *_totals(explanation)])


def _pad(cell: str, width: int, side: str) -> str:
    return f"{cell:{side}{width}}"


def _columns(explanation: Explanation) -> list[tuple[str, str, Callable[[Row], str]]]:
    """Returns each column's title, side and cell."""
    blocks, plan = explanation.num_blocks, explanation.plan
    columns = [
        ("residual", "<", lambda row: row.name),
        ("made at", "<", lambda row: row.source),
        ("array", "<", _array),
        ("MiB", ">", lambda row: _mib(row.residual_bytes)),
    ]
    if blocks is not None:
        columns.append((f"x {blocks}", ">", lambda row: _mib(row.residual_bytes * blocks)))
    columns.append(("GFLOP", ">", lambda row: f"{row.recompute_flops / 1e9:.3g}"))
    if plan is not None:
        columns.append((plan, "<", lambda row: row.decision))
        columns.append(("keeps MiB", ">", lambda row: _mib(row.saved_bytes + row.host_bytes)))
    return [*columns, ("made again from", "<", lambda row: row.recompute)]


def _array(row: Row) -> str:
    more = f" +{row.num_arrays - 1}" if row.num_arrays > 1 else ""
    return f"{row.dtype}[{','.join(map(str, row.shape))}]{more}"


def _totals(explanation: Explanation) -> list[str]:
    found = explanation
    lines = [
        f"R = {_mib(found.residual_bytes)} MiB a block without remat, "
        f"a = {_mib(found.carry_bytes)} MiB (carry), R/a = {found.ratio:.1f}"
    ]
    if found.saved_bytes is not None and found.host_bytes is not None:
        times = f", x {found.num_blocks} blocks" if found.num_blocks else ""
        total = found.saved_bytes * (found.num_blocks or 1)
        lines.append(
            f"{found.plan}: {_mib(found.saved_bytes)} MiB a block saved on the device, "
            f"{_mib(found.host_bytes)} MiB on the host"
            + (f"{times} {_mib(total)} MiB on the device" if times else "")
        )
    lines.append(
        f"not counted: {_mib(found.shared_bytes)} MiB of parameters and consts, "
        "which are in memory anyway and read again"
    )
    return lines


def _mib(size: int) -> str:
    return f"{size / _MIB:.3g}" if size < 1000 * _MIB else f"{size / _MIB:.0f}"
