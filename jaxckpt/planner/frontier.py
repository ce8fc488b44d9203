"""Inside a block: which values to keep, by an exact mixed-integer program (HiGHS, through scipy).

The steps of a block's forward pass, as `jax.vjp` runs it, form a graph. For a number of bytes M:

    minimize    sum of seconds[s] * rerun[s] + sum of keeping[v] * kept[v]
    subject to  rerun[maker(v)] + kept[v] >= 1          for each residual v
                rerun[maker(v)] + kept[v] >= rerun[s]   for each input v of each step s
                sum of bytes[v] * kept[v] <= M,         kept[v] in {0, 1}

Values that a plan can only name together (one tag, an attention kernel's arrays, what one step
returns) share one `kept`; `keeping` is the time of copying them for the backward pass. Block
inputs, parameters and constants are there anyway. Sweeping M gives the frontier. Steps are costed
one by one, which knows nothing of fusion: the sets found here are proposals, which
`costs.kind_cost` then costs as JAX and the roofline see them.

References:
  Jain et al. 2020, Checkmate: Breaking the memory wall with optimal tensor rematerialization.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from jaxckpt.memory.flat import Step, Value
from jaxckpt.memory.flops import step_flops
from jaxckpt.memory.fusion import kind_of
from jaxckpt.memory.residuals import Trace, origin_of
from jaxckpt.memory.roofline import (
    BYTES_EFFICIENCY,
    MATMUL_EFFICIENCY,
    Rates,
    nested_seconds,
)
from jaxckpt.memory.slow_steps import extra_bytes
from jaxckpt.memory.values import all_named, values_by_name
from jaxckpt.planner.integer_program import grain, minimize
from jaxckpt.planner.stacks import Stack
from jaxckpt.plans import Policy, words
from jaxckpt.transforms import jaxprs, tags

_LOG = logging.getLogger(__name__)
# What a step moves when it is run again, in the bytes that it writes: fused work rarely goes to
# memory.
_FUSED_SHARE = 0.25
# What keeping a value moves beside its making: it is copied for the backward pass and read there.
_KEEPING_SHARE = 2.0
# The sizes that are looked at, as shares of what is kept where memory does not matter.
_SHARES = (1, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16, 1 / 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """What a plan keeps or not by one word.

    Attributes:
      policy: The word.
      values: Kept by it.
      seconds: What keeping them takes.
    """

    policy: Policy
    values: tuple[Value, ...]
    seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all its values."""
        return sum(value.nbytes for value in self.values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """A block's forward pass as the program sees it.

    Attributes:
      steps: Those that some residual needs, in order.
      seconds: Of each, run again.
      residuals: Values that the backward pass needs and that are no inputs.
      units: What can be kept.
    """

    steps: tuple[Step, ...]
    seconds: tuple[float, ...]
    residuals: tuple[Value, ...]
    units: tuple[Unit, ...]

    @classmethod
    def of(cls, stack: Stack, rates: Rates) -> "Graph":
        """Returns the graph of a stack's block."""
        block = lambda carry, params_i, consts: stack.call(carry, params_i, consts)
        given = (stack.params_i, stack.carry, (stack.consts,))
        try:
            trace = Trace(all_named(block, opens_remat=True), *given)
        except Exception:  # a block that JAX does not run again from its equations
            _LOG.debug("values without a tag cannot be named", exc_info=True)
            trace = Trace(block, *given)
        residuals = [r.origin for r in trace.residuals if r.origin.step is not None]
        steps = trace.flat.live_steps()
        return cls(
            steps=tuple(steps),
            seconds=tuple(_seconds(step, rates) for step in steps),
            residuals=tuple(dict.fromkeys(residuals)),
            units=tuple(_units(trace, set(steps), rates)),
        )


def proposals(graph: Graph) -> Iterator[tuple[Policy, ...]]:
    """Yields the policies of the frontier, from those that keep most to those that keep least."""
    if not graph.units:
        return
    program = Program(graph)
    room = most = float(sum(unit.nbytes for unit in graph.units))
    for share in _SHARES:
        room = min(room, share * most)
        if room < 0:
            return
        units = list(itertools.compress(graph.units, program.solve(room)))
        yield tuple(unit.policy for unit in units)
        used = sum(unit.nbytes for unit in units)
        most = used if share == 1 else most
        room = used - program.grain / 2


class Program:
    """The program's matrix, built once; only M changes.

    Attributes:
      matrix: A row a constraint but for the last; columns are the steps, then the units.
      bounds: What each row is at least.
      grain: Bytes of the program's unit.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.place: dict[Step | None, int] = {step: n for n, step in enumerate(graph.steps)}
        self.units_of: dict[Value, list[int]] = {}
        for n, unit in enumerate(graph.units):
            for value in unit.values:
                self.units_of.setdefault(value, []).append(n)
        rows = [self._row(value, None) for value in graph.residuals]
        for step in graph.steps:
            origins = dict.fromkeys(origin_of(value) for value in step.inputs)
            rows += [self._row(value, step) for value in origins if value.step in self.place]
        self.bounds = [1.0] * len(graph.residuals) + [0.0] * (len(rows) - len(graph.residuals))
        self.matrix = self._sparse(rows)
        scale = max(graph.seconds) or 1.0
        sizes = [unit.nbytes for unit in graph.units]
        self.grain = grain(sizes)
        # Of sets that cost the same the smallest is taken, and then the one of the fewest names.
        tie = lambda size: 1e-6 * size / max(sum(sizes), 1) + 1e-8
        keeping = [unit.seconds / scale + tie(unit.nbytes) for unit in graph.units]
        self.cost = np.array([*(s / scale for s in graph.seconds), *keeping])
        self.sizes = np.array([*([0.0] * len(graph.steps)), *sizes])

    def _row(self, value: Value, user: Step | None) -> dict[int, float]:
        row = {self.place[value.step]: 1.0}
        for unit in self.units_of.get(value, ()):
            row[len(self.place) + unit] = 1.0
        if user is not None:
            row[self.place[user]] = row.get(self.place[user], 0.0) - 1.0
        return row

    def _sparse(self, rows: Sequence[dict[int, float]]):
        from scipy.sparse import csr_array

        entries = [
            (n, column, value) for n, row in enumerate(rows) for column, value in row.items()
        ]
        where_row, where_column, values = zip(*entries, strict=True)
        shape = (len(rows), len(self.place) + len(self.graph.units))
        return csr_array((values, (where_row, where_column)), shape=shape)

    def solve(self, room: float) -> list[bool]:
        """Returns which units an optimal solution within `room` bytes keeps."""
        from scipy.optimize import LinearConstraint

        count = len(self.place)
        least = cast(Any, np.array(self.bounds))
        found = minimize(
            self.cost,
            [
                LinearConstraint(self.matrix, lb=least),
                LinearConstraint(self.sizes[None] / self.grain, ub=room / self.grain),
            ],
            upper=1.0,
            integrality=np.array([0] * count + [1] * len(self.graph.units)),
        )
        assert found is not None  # everything may be made again
        return [bool(x > 0.5) for x in found[count:]]


def _units(trace: Trace, live: set[Step], rates: Rates) -> Iterator[Unit]:
    """Yields what a plan can keep and the backward pass has a use for."""
    kernel = _kept_by_attention(trace)
    by_name = values_by_name(trace.flat)
    for value, names in trace.tags.items():
        for name in names:
            by_name[name] = (*by_name.get(name, ()), value)
    found: list[tuple[Policy, Sequence[Value]]] = []
    if kernel:
        found.append((Policy(kind="attention"), kernel))
    for name, values in by_name.items():
        if words.is_invented(name):  # a user's own word for a value comes first
            values = [v for v in values if v not in trace.tags and v not in kernel]
        found.append((Policy(kind="names", names=(name,)), values))
    for policy, values in found:
        values = tuple(value for value in dict.fromkeys(values) if value.step in live)
        moved = _KEEPING_SHARE * sum(value.nbytes for value in values)
        seconds = moved / (rates.bytes_per_second * BYTES_EFFICIENCY)
        if values:
            yield Unit(policy=policy, values=values, seconds=seconds)


def _kept_by_attention(trace: Trace) -> list[Value]:
    """Returns what the policy `attention` keeps of a block."""
    kernels = [
        value
        for step in trace.flat.steps
        if step.name in tags.ATTENTION_PRIMITIVES
        for value in step.outputs
    ]
    tagged = [
        origin_of(step.outputs[0])
        for step in trace.flat.steps
        if step.name == jaxprs.TAG and step.params["name"] == tags.ATTENTION
    ]
    return [value for value in dict.fromkeys([*kernels, *tagged]) if value.step is not None]


def _seconds(step: Step, rates: Rates) -> float:
    flops = float(step_flops(step))
    inputs = sum(value.nbytes for value in step.inputs)
    outputs = sum(value.nbytes for value in step.outputs)
    kind = kind_of(step)
    if kind == "nested":
        return nested_seconds(step, rates)
    moved = _FUSED_SHARE * outputs if kind == "fused" else inputs + outputs + extra_bytes(step)
    by_bytes = moved / (rates.bytes_per_second * BYTES_EFFICIENCY)
    return max(by_bytes, flops / (rates.flops_per_second * MATMUL_EFFICIENCY))
