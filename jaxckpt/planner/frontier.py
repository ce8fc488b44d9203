"""Inside a block: which values to keep, by an exact mixed-integer program (HiGHS, through scipy).

The steps of a block's forward pass, as `jax.vjp` runs it, form a graph. For a number of bytes M:

    minimize    sum of seconds[s] * rerun[s]
    subject to  rerun[maker(v)] + kept[v] >= 1          for each residual v
                rerun[maker(v)] + kept[v] >= rerun[s]   for each input v of each step s
                sum of bytes[v] * kept[v] <= M,         kept[v] in {0, 1}

Values that a plan can only name together (one tag, an attention kernel's arrays) share one `kept`.
Block inputs, parameters and constants are there anyway. Sweeping M gives the frontier. Steps are
costed one by one, which knows nothing of fusion: the sets found here are proposals, which
`costs.kind_cost` then costs as JAX and the roofline see them.

References:
  Jain et al. 2020, Checkmate: Breaking the memory wall with optimal tensor rematerialization.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxckpt.memory.flat import Step, Value
from jaxckpt.memory.flops import step_flops
from jaxckpt.memory.fusion import kind_of
from jaxckpt.memory.residuals import Trace, origin_of
from jaxckpt.memory.roofline import BYTES_EFFICIENCY, MATMUL_EFFICIENCY, Rates
from jaxckpt.planner.stacks import Stack
from jaxckpt.plans import Policy

# What a step moves when it is run again, in the bytes that it writes: fused work rarely goes to
# memory, random bits are arithmetic.
_FUSED_SHARE = 0.25
_RANDOM_SHARE = 8.0
_RANDOM = ("random_bits", "threefry2x32", "random_seed", "random_wrap")
_MOST_POINTS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """What a plan keeps or not by one word.

    Attributes:
      policy: The word.
      values: Kept by it.
    """

    policy: Policy
    values: tuple[Value, ...]

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
        trace = Trace(block, stack.params_i, stack.carry, (stack.consts,))
        residuals = [r.origin for r in trace.residuals if r.origin.step is not None]
        steps = trace.flat.live_steps()
        return cls(
            steps=tuple(steps),
            seconds=tuple(_seconds(step, rates) for step in steps),
            residuals=tuple(dict.fromkeys(residuals)),
            units=tuple(_units(trace)),
        )


def proposals(graph: Graph) -> Iterator[tuple[Policy, ...]]:
    """Yields the policies of the frontier, from those that keep most to those that keep least."""
    if not graph.units:
        return
    program = Program(graph)
    room = sum(unit.nbytes for unit in graph.units)
    step = max(room // _MOST_POINTS, 1)
    while room >= 0:
        kept = program.solve(room)
        yield tuple(unit.policy for unit, is_kept in zip(graph.units, kept, strict=True) if is_kept)
        used = sum(unit.nbytes for unit, is_kept in zip(graph.units, kept, strict=True) if is_kept)
        room = min(used - 1, room - step)


class Program:
    """The program's matrix, built once; only M changes.

    Attributes:
      matrix: A row a constraint but for the last; columns are the steps, then the units.
      bounds: What each row is at least.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.place = {step: n for n, step in enumerate(graph.steps)}
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
        # Of sets that cost the same the smallest is taken.
        tie = 1e-6 / max(sum(sizes), 1)
        self.cost = np.array([*(s / scale for s in graph.seconds), *(tie * b for b in sizes)])
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

    def solve(self, room: int) -> list[bool]:
        """Returns which units an optimal solution within `room` bytes keeps."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        count = len(self.place)
        integrality = np.array([0] * count + [1] * len(self.graph.units))
        found = milp(
            self.cost,
            constraints=[
                LinearConstraint(self.matrix, lb=np.array(self.bounds)),
                LinearConstraint(self.sizes[None] / 2**20, ub=room / 2**20),
            ],
            bounds=Bounds(0, 1),
            integrality=integrality,
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise RuntimeError(f"the program of a block has no solution: {found.message}")
        return [bool(x > 0.5) for x in found.x[count:]]


def _units(trace: Trace) -> Iterator[Unit]:
    by_tag: dict[str, list[Value]] = {}
    for value, names in trace.tags.items():
        for name in names:
            by_tag.setdefault(name, []).append(value)
    kernel = [value for value in trace.kernels if value.step is not None]
    if kernel:
        yield Unit(policy=Policy(kind="attention"), values=tuple(kernel))
    for name, values in sorted(by_tag.items()):
        yield Unit(policy=Policy(kind="names", names=(name,)), values=tuple(values))


def _seconds(step: Step, rates: Rates) -> float:
    flops = float(step_flops(step))
    inputs = sum(value.nbytes for value in step.inputs)
    outputs = sum(value.nbytes for value in step.outputs)
    kind = kind_of(step)
    if step.name in _RANDOM:
        moved = _RANDOM_SHARE * outputs
    elif kind == "fused":
        moved = _FUSED_SHARE * outputs
    else:
        moved = inputs + outputs
    by_bytes = moved / (rates.bytes_per_second * BYTES_EFFICIENCY)
    return max(by_bytes, flops / (rates.flops_per_second * MATMUL_EFFICIENCY))
