"""`explain`: every residual of a block, its bytes, and the FLOPs of recomputing it.

    print(jaxckpt.explain(block, params_i, x, num_blocks=28, plan="dots"))

The block is traced, never run, so an argument may be a `jax.ShapeDtypeStruct`. The list has the
residuals that `jax.vjp` keeps. XLA may drop a copy or merge equal arrays. The result is an
`Explanation`, frozen data that prints as a table.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax

from jaxckpt.costs import residuals as traces
from jaxckpt.costs.flat import Value, where
from jaxckpt.costs.flops import step_flops
from jaxckpt.costs.residuals import Residual, Trace, slice_of
from jaxckpt.plans import Plan
from jaxckpt.transforms import jaxprs, value_names
from jaxckpt.transforms.checks import check_policies
from jaxckpt.transforms.policies import plan_and_policy
from jaxckpt.transforms.traced_block import trace_block

_MIB, _LONGEST_CHAIN = 2**20, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One residual, or the residuals of one attention kernel together.

    Attributes:
      name: The user's tag, `carry` for the block's input, `attention`, or the primitive.
      source: The line that makes the residual, such as `file.py:123`; `""` if unknown.
      shape: The shape of the row's largest array.
      dtype: The dtype of the row's largest array.
      num_arrays: The number of arrays in the row.
      residual_bytes: Bytes kept without remat; 0 if only the plan keeps the array.
      recompute_flops: Matrix-product FLOPs of computing the residual from the block's inputs.
      recompute: The primitives that compute the residual, from the last primitive to an input.
      decision: The plan's decision on the residual: `saved`, `host`, `recomputed`, `saved+host`, or
        `partly saved` (some of a kernel's arrays); None without a plan.
      saved_bytes: Bytes of the residual that the plan keeps on the device; None without a plan.
      host_bytes: Bytes of the residual that the plan keeps on the host; None without a plan.
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
      rows: The residuals. Parameters, consts and unchanged carry leaves of the block are not
        listed, because they are always in memory. A cast or transposed copy of one is listed.
      carry_bytes: a, the bytes of the block's input without leaves that the block returns
        unchanged.
      shared_bytes: The bytes of unlisted arrays that the backward pass reads.
      num_blocks: The number of blocks, L; None if it was not given.
      plan: The plan's text, or the policy's name; None if none was given.
    """

    rows: tuple[Row, ...]
    carry_bytes: int
    shared_bytes: int
    num_blocks: int | None = None
    plan: str | None = None

    @property
    def residual_bytes(self) -> int:
        """R, the bytes that a block keeps without remat."""
        return sum(row.residual_bytes for row in self.rows)

    @property
    def ratio(self) -> float:
        """R / a, a block's residuals in multiples of its carry."""
        return self.residual_bytes / self.carry_bytes if self.carry_bytes else float("inf")

    @property
    def saved_bytes(self) -> int | None:
        """The bytes that a block keeps on the device under the plan; None without a plan."""
        return None if self.plan is None else sum(row.saved_bytes or 0 for row in self.rows)

    @property
    def host_bytes(self) -> int | None:
        """The bytes that a block keeps on the host under the plan; None without a plan."""
        return None if self.plan is None else sum(row.host_bytes or 0 for row in self.rows)

    def __str__(self) -> str:
        rows, blocks = self.rows, self.num_blocks
        columns = [
            ("residual", "<", [row.name for row in rows]),
            ("made at", "<", [row.source for row in rows]),
            ("array", "<", [_array(row) for row in rows]),
            ("MiB", ">", [_mib(row.residual_bytes) for row in rows]),
        ]
        if blocks is not None:
            columns.append(
                (f"x {blocks}", ">", [_mib(row.residual_bytes * blocks) for row in rows])
            )
        columns.append(("GFLOP", ">", [f"{row.recompute_flops / 1e9:.3g}" for row in rows]))
        if self.plan is not None:
            kept = [(row.saved_bytes or 0) + (row.host_bytes or 0) for row in rows]
            columns.append((self.plan, "<", [row.decision or "" for row in rows]))
            columns.append(("keeps MiB", ">", list(map(_mib, kept))))
        columns.append(("made again from", "<", [row.recompute for row in rows]))
        padded = []
        for title, side, cells in columns:
            width = max(map(len, [title, *cells]))
            padded.append([f"{cell:{side}{width}}" for cell in (title, *cells)])
        lines = ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
        return "\n".join([*lines, *_totals(self)])


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


# Primitives that the text of `Row.recompute` leaves out.
_SILENT = frozenset((jaxprs.TAG, jaxprs.ROUND, jaxprs.PUT, jaxprs.CAST, jaxprs.BROADCAST))
_SILENT |= {*jaxprs.SHAPES}


def explain(
    block: Callable,
    params_i,
    carry,
    *consts,
    num_blocks: int | None = None,
    plan: str | Plan | Callable | None = None,
) -> Explanation:
    """Lists every residual of one block, and a plan's decision on each residual.

    A residual's name is its tag, or an invented name such as `@tanh.1`. The policy `names:` takes
    names of both sorts.

    Args:
      block: `block(carry, params_i, *consts) -> carry`, as for `jaxckpt.scan_blocks`.
      params_i: The parameters of one block, arrays or abstract.
      carry: The block's input, arrays or abstract.
      *consts: Arrays that all blocks share.
      num_blocks: The number of blocks, L; adds a column for the whole stack.
      plan: A plan of one stage, or a policy of `jax.checkpoint`; adds the plan's decision on each
        residual. For `uniform` and `every`, the decision holds for a block of the live segment.

    Returns:
      An `Explanation`: the residuals as rows, largest first, in bytes; `print` shows a table.

    Raises:
      PlanError: The plan does not parse, has several stages, or names a value that the block lacks.
      ValueError: `num_blocks` is below 1, the parameters are of a whole stack, or the arguments are
        in another order.

    Example:
      >>> import jax.numpy as jnp, jaxckpt
      >>> block = lambda x, w: jnp.sin(jaxckpt.tag(x @ w, "product"))
      >>> found = jaxckpt.explain(block, jnp.ones([8, 8]), jnp.ones([4, 8]))
      >>> found.residual_bytes, found.carry_bytes
      (256, 128)
    """
    if num_blocks is not None and (isinstance(num_blocks, bool) or num_blocks < 1):
        raise ValueError(f"num_blocks is {num_blocks}; a stack has at least 1 block")
    traces.check_arguments(block, params_i, carry, consts)
    changed = trace_block(block, carry, params_i, consts)[0].changed
    handed_on = set(range(len(jax.tree.leaves(carry)))).difference(changed)
    trace = Trace(block, params_i, carry, consts, handed_on)
    kept = given = None
    if plan is not None:
        plan, given = plan_and_policy(plan)
        stage = traces.single_stage(plan)
        args = (carry, params_i, *consts)
        check_policies(plan, lambda asked: value_names.offered(block, asked, *args))
        under = traces.checkpointed(block, stage, given)
        kept = Trace(under, params_i, carry, consts, handed_on)
    names = traces.names_by_key(block, params_i, carry, consts)
    rows = [_row(names, *found) for found in _matched(trace, kept)]
    rows.sort(key=lambda row: -max(row.residual_bytes, row.saved_bytes or 0, row.host_bytes or 0))
    return Explanation(
        rows=tuple(rows),
        carry_bytes=sum(value.nbytes for value in trace.carry),
        shared_bytes=sum(value.nbytes for value in dict.fromkeys(trace.shared)),
        num_blocks=num_blocks,
        plan=None if plan is None else str(given or plan),
    )


def _matched(
    trace: Trace, kept: Trace | None
) -> Iterator[tuple[Trace, list[Residual], list[Residual] | None]]:
    """Yields `(trace, residuals, residuals under the plan)` for each row of the table."""
    under = None if kept is None else _grouped(kept)
    for key, residuals in _grouped(trace).items():
        yield trace, residuals, None if under is None else under.pop(key, [])
    if kept is not None and under is not None:
        yield from ((kept, [], residuals) for residuals in under.values())


def _grouped(trace: Trace) -> dict[tuple, list[Residual]]:
    """Returns the residuals by row: one row per value, and one per attention kernel."""
    groups: dict[tuple, list[Residual]] = {}
    for residual in trace.residuals:
        key = trace.kernels.get(residual.origin) or residual.key
        groups.setdefault(key, []).append(residual)
    return groups


def _row(
    names: dict[tuple, str], trace: Trace, residuals: list[Residual], under: list[Residual] | None
) -> Row:
    shown = residuals or under or []
    residual = max(shown, key=lambda residual: residual.origin.nbytes)
    largest = residual.origin
    flops = sum(step_flops(step) for step in slice_of(residual.origin for residual in shown))
    row = Row(
        name=_name(trace, largest, names.get(residual.key)),
        source="" if largest.step is None else where(largest.step),
        shape=tuple(largest.aval.shape),
        dtype=str(largest.aval.dtype),
        num_arrays=len(shown),
        residual_bytes=_bytes(residuals),
        recompute_flops=int(flops),
        recompute=_chain(trace, largest),
    )
    if under is None:
        return row
    return dataclasses.replace(
        row,
        decision=_decision(residuals, under),
        saved_bytes=_bytes(r for r in under if not r.is_host),
        host_bytes=_bytes(r for r in under if r.is_host),
    )


def _bytes(residuals: Iterable[Residual]) -> int:
    return sum(residual.value.nbytes for residual in residuals)


def _decision(residuals: list[Residual], under: list[Residual]) -> str:
    if not under:
        return "recomputed"
    places = {residual.is_host for residual in under}
    if len(places) > 1:
        return "saved+host"
    keys = {residual.key for residual in under}
    if any(residual.key not in keys for residual in residuals):
        return "partly saved"
    return "host" if places == {True} else "saved"


def _name(trace: Trace, largest: Value, invented: str | None) -> str:
    if largest in trace.carry:
        return trace.labels[largest]
    if largest in trace.kernels and invented is None:  # an invented name of a Pallas kernel wins
        return "attention"
    if largest in trace.tags:
        return trace.tags[largest][0]
    if largest.step is None:
        return "a constant"
    sources = {v for step in slice_of([largest]) for v in step.inputs if v in trace.labels}
    if len(sources) == 1 and not sources & set(trace.carry):
        return f"{largest.step.name} of {trace.labels[sources.pop()]}"
    return invented or largest.step.name


def _chain(trace: Trace, value: Value) -> str:
    """Returns the steps that compute `value` from the carry, last step first, without casts."""
    names = []
    while value.step is not None:
        if not names or value.step.name not in _SILENT:
            names.append(value.step.name)
        if not value.step.inputs:
            break
        rank = lambda value: (value in trace.moving, value.constant is None, value.nbytes)
        value = max(value.step.inputs, key=rank)
    if value in trace.labels:
        names.append(trace.labels[value])
    if len(names) > _LONGEST_CHAIN + 2:
        names[_LONGEST_CHAIN:-1] = [f"{len(names) - _LONGEST_CHAIN - 1} more"]
    return " < ".join(names)
