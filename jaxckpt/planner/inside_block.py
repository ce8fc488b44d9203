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

Three sweeps use the program.

- `proposals`: all values that a plan can name.
- `lean_proposals`: tags and attention kernels, with the matrix products of a step in place of its
  seconds. These are what a user could name by hand that recomputes least: plain plans, beside
  `dots` and its like. `search.py` puts no plan before one of them that needs no more memory and
  multiplies less.
- `offload_proposals`: one more choice for each value, and for the block's input: to move it to the
  host in the forward pass and back in the backward pass. Where the link runs beside the
  computation, each pass takes the longer of the two:

    minimize    forward + backward
    subject to  forward  >= F,  forward  >= moved bytes / link,  backward >= moved bytes / link
                backward >= B + sum of seconds[s] * rerun[s]
                              + sum of keeping[v] * (kept[v] + moved[v])
                rerun[maker(v)] + kept[v] + moved[v] >= 1          for each residual v
                rerun[maker(v)] + kept[v] + moved[v] >= rerun[s]   for each input v of each step s
                kept[v] + moved[v] <= 1
                kept bytes, the block's input where it stays among them, <= M
                moved bytes <= H

  Where it does not, `moved bytes / link` is added to both passes instead. An attention kernel's
  arrays have no name of their own, so they are kept or made again.

HiGHS takes a bound as kept that is missed by 1e-6 of its unit. A block's arrays weigh from bytes to
GiB: in bytes the numbers would differ too much, and in MiB one byte less would be no less. So each
program is in units of its own sizes.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from jaxckpt.costs.flat import Step, Value
from jaxckpt.costs.flops import step_flops
from jaxckpt.costs.fusion import extra_bytes, kind_of
from jaxckpt.costs.residuals import Trace, all_named, origin_of, values_by_name
from jaxckpt.costs.roofline import BYTES_EFFICIENCY, MATMUL_EFFICIENCY, Rates, nested_seconds
from jaxckpt.planner.stacks import Stack
from jaxckpt.plans import Policy, words
from jaxckpt.targets.links import HostLink
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


# Of steps with the same products, those that take less time; too little to outweigh a product.
_TIE = 1e-4


def lean_proposals(graph: Graph, rates: Rates) -> Iterator[tuple[Policy, ...]]:
    """Yields policies over a user's own names, from those that keep most to those that keep least.

    Args:
      graph: Of a block.
      rates: The chip's.
    """
    products = [float(step_flops(step)) / rates.flops_per_second for step in graph.steps]
    seconds = (p + _TIE * s for p, s in zip(products, graph.seconds, strict=True))
    named = (unit for unit in graph.units if not any(map(words.is_invented, unit.policy.names)))
    units = tuple(dataclasses.replace(unit, seconds=0.0) for unit in named)
    yield from proposals(dataclasses.replace(graph, seconds=tuple(seconds), units=units))


_INFEASIBLE, _FAILED = 2, 4  # as scipy's milp says it
_FINEST = 2.0**-20  # of all bytes


def grain(sizes: Sequence[float]) -> float:
    """Returns the bytes of a program's unit: what all sizes are multiples of, if that is not tiny.

    Sets of values whose bytes differ by less than it are equal to the program.
    """
    common = math.gcd(*map(round, sizes)) if len(sizes) else 1
    return max(float(common), _FINEST * sum(sizes), 1.0)


def minimize(cost, constraints, *, upper: Any, integrality) -> np.ndarray | None:
    """Returns an optimal point of `0 <= x <= upper`; None where there is no point.

    Args:
      cost: Of each column.
      constraints: `scipy.optimize.LinearConstraint`s.
      upper: Bound of all columns, or an array of one for each.
      integrality: 1 for a whole number, else 0.

    Raises:
      RuntimeError: The solver gave up.
    """
    from scipy.optimize import Bounds, milp

    options = {"mip_rel_gap": 0.0}
    asked: dict[str, Any] = {"bounds": Bounds(0, upper), "integrality": integrality}
    found = milp(cost, constraints=constraints, options=options, **asked)
    if found.status == _FAILED:  # presolving has been wrong by its own tolerance
        options["presolve"] = False
        found = milp(cost, constraints=constraints, options=options, **asked)
    if found.status == _INFEASIBLE:
        return None
    if found.x is None:
        raise RuntimeError(f"the program of a block has no answer: {found.message}")
    return found.x


_MOST_POINTS = 8
# Of all bytes, in units of a block's seconds: of sets that cost the same, the smallest is taken.
_BYTES_TIE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
    """What one block takes, and what its input weighs.

    Attributes:
      forward_seconds: The forward pass.
      backward_seconds: The backward pass alone, with nothing to run again.
      carry_bytes: The block's input.
      link: To the host.
    """

    forward_seconds: float
    backward_seconds: float
    carry_bytes: float
    link: HostLink


def offload_proposals(
    graph: Graph, passes: Passes, most_bytes: float
) -> Iterator[tuple[Policy, ...]]:
    """Yields policies that move something, from those that keep most to those that keep least.

    Args:
      graph: Of a block.
      passes: Of the same block.
      most_bytes: What a block may have on the host.
    """
    program = _Program(graph, passes, most_bytes)
    room = program.all_bytes
    step = max(room / _MOST_POINTS, 1.0)
    while room >= 0:
        found = program.solve(room)
        if found is None:  # the block's input has to stay, and does not fit
            return
        policies, used = found
        if any(policy.kind == "offload" for policy in policies):
            yield policies
        room = min(used - program.grain / 2, room - step)


class _Program:
    """The program's matrix: columns are reruns, kept units, moved units, the input moved, times."""

    def __init__(self, graph: Graph, passes: Passes, most_bytes: float):
        self.graph, self.passes, self.most_bytes = graph, passes, most_bytes
        self.moving: list[int] = [
            n for n, unit in enumerate(graph.units) if unit.policy.kind == "names"
        ]
        self.base = Program(graph) if graph.units else None
        self.sizes = np.array([unit.nbytes for unit in graph.units], float)
        self.moved_sizes = np.array([*self.sizes[self.moving], passes.carry_bytes])
        self.all_bytes = float(self.sizes.sum() + passes.carry_bytes)
        self.grain = grain([*self.sizes, passes.carry_bytes])

    def solve(self, room: float) -> tuple[tuple[Policy, ...], float] | None:
        """Returns an optimal solution within `room` bytes on the device, and the bytes it keeps.

        None if there is no solution.
        """
        steps, units, moved = len(self.graph.steps), len(self.sizes), len(self.moved_sizes)
        found = minimize(
            self._cost(),
            self._constraints(room),
            upper=np.array([1.0] * (steps + units + moved) + [np.inf, np.inf]),
            integrality=np.array([0] * steps + [1] * (units + moved) + [0, 0]),
        )
        if found is None:
            return None
        chosen = found[steps : steps + units + moved] > 0.5
        return self._policies(chosen[:units], chosen[units:])

    @property
    def _unit_seconds(self) -> float:
        return self.passes.forward_seconds + self.passes.backward_seconds

    def _cost(self) -> np.ndarray:
        tie = _BYTES_TIE / max(self.all_bytes, 1.0)
        kept, moved = tie * self.sizes, 2 * tie * self.moved_sizes
        return np.concatenate([np.zeros(len(self.graph.steps)), kept, moved, [1.0, 1.0]])

    def _constraints(self, room: float) -> list:
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csr_array, hstack

        passes, second = self.passes, self._unit_seconds
        steps, units, moved = len(self.graph.steps), len(self.sizes), len(self.moved_sizes)
        link = self.moved_sizes / passes.link.bytes_per_second / second
        after = -link * (not passes.link.overlaps)
        rerun = np.array(self.graph.seconds) / second
        keeping = np.array([unit.seconds for unit in self.graph.units]) / second
        moving = np.array([*keeping[self.moving], 0.0])
        none = lambda count: np.zeros(count)
        row = lambda *parts: np.concatenate(parts)[None]
        kept_bytes = row(none(steps), self.sizes / self.grain, none(moved), none(2))
        kept_bytes[0, steps + units + moved - 1] = -passes.carry_bytes / self.grain
        found = [
            LinearConstraint(
                row(none(steps), none(units), after, [1.0, 0.0]),
                lb=passes.forward_seconds / second,
            ),
            LinearConstraint(
                row(-rerun, -keeping, after - moving, [0.0, 1.0]),
                lb=passes.backward_seconds / second,
            ),
            LinearConstraint(row(none(steps), none(units), -link, [1.0, 0.0]), lb=0),
            LinearConstraint(row(none(steps), none(units), -link, [0.0, 1.0]), lb=0),
            LinearConstraint(kept_bytes, ub=(room - passes.carry_bytes) / self.grain),
            LinearConstraint(
                row(none(steps), none(units), self.moved_sizes / self.grain, none(2)),
                ub=self.most_bytes / self.grain,
            ),
        ]
        if self.base is not None:
            # A moved value serves the backward pass as a kept one does.
            base: Any = self.base.matrix
            copies = base[:, [steps + n for n in self.moving]]
            rest = csr_array((base.shape[0], 3))
            matrix = hstack([base, copies, rest], format="csr")
            least: Any = np.array(self.base.bounds)
            found.append(LinearConstraint(matrix, lb=least))
        if self.moving:
            once = np.zeros((len(self.moving), steps + units + moved + 2))
            for place, unit in enumerate(self.moving):
                once[place, steps + unit] = once[place, steps + units + place] = 1.0
            found.append(LinearConstraint(once, ub=1.0))
        return found

    def _policies(self, kept, moved) -> tuple[tuple[Policy, ...], float]:
        """Returns what the columns that are 1 are called, and what is kept in bytes."""
        policies = [
            unit.policy for unit, is_kept in zip(self.graph.units, kept, strict=True) if is_kept
        ]
        names = [words.CARRY] * bool(moved[-1])
        for place, unit in enumerate(self.moving):
            if moved[place]:
                names += self.graph.units[unit].policy.names
        if names:
            policies.append(Policy(kind="offload", names=tuple(names)))
        used = float(self.sizes @ kept) + self.passes.carry_bytes * (not moved[-1])
        return tuple(policies), used
