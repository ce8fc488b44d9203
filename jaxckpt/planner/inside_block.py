"""Which values of a block to keep, by an exact mixed-integer program (HiGHS, through scipy).

The steps of a block's forward pass, as `jax.vjp` runs it, form a graph. For a number of bytes M:

    minimize    sum of seconds[s] * rerun[s] + sum of keeping[v] * kept[v]
    subject to  rerun[maker(v)] + kept[v] >= 1          for each residual v
                rerun[maker(v)] + kept[v] >= rerun[s]   for each input v of each step s
                sum of bytes[v] * kept[v] <= M,         kept[v] in {0, 1}

`rerun[s]` says that the backward pass recomputes step s. Some values can only be named together:
the values of one tag, an attention kernel's arrays, one step's outputs. Such values share one
`kept`. `keeping` is the time of copying values for the backward pass. Block inputs, parameters and
constants always exist. Solving for many M gives the frontier. Steps are costed one by one, without
fusion, so the solutions are only proposals. `kinds.kind_cost` costs each proposal by the roofline
of the whole block.

References:
  Jain et al. 2020, Checkmate: Breaking the memory wall with optimal tensor rematerialization.

Three functions solve the program for many M.

- `proposals`: over all values that a plan can name.
- `lean_proposals`: over tags and attention kernels only, at the cost of the recomputed matrix
  products. These are the best plans that a user could write by hand. They count as plain plans,
  like `dots`: `search.py` puts no plan before a plain plan that needs no more memory and recomputes
  fewer matrix products.
- `offload_proposals`: each value, and the block's input, may also be moved to the host in the
  forward pass and back in the backward pass. A moved value serves the backward pass like a kept
  value, at the same cost:

    kept[v] + moved[v] <= 1
    kept bytes, with the block's input unless it is moved, <= M
    moved bytes <= H

  If the link runs during the computation, each pass waits until its transfers are done. Both waits
  are added to the seconds that are minimized:

    waited[forward]  >= moved bytes / link - F
    waited[backward] >= moved bytes / link - B - sum of seconds[s] * rerun[s]
                                               - sum of keeping[v] * (kept[v] + moved[v])

  Otherwise each pass waits for `moved bytes / link`. An attention kernel's arrays have no name of
  their own, so they are kept or recomputed, never moved.

HiGHS allows a bound to be missed by 1e-6 of the program's unit. The sizes of a block's arrays range
from bytes to GiB. With bytes as the unit, numbers would differ too much for HiGHS. With MiB, HiGHS
could not see a difference of one byte. So each program's unit depends on its sizes (`grain`).
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
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
# The memory traffic of a recomputed elementwise step, as a share of the bytes that it returns:
# fused values rarely go to memory.
_FUSED_SHARE = 0.25
# The memory traffic of keeping a value, as a multiple of its bytes: one copy, and one read in the
# backward pass.
_KEEPING_SHARE = 2.0
# The values of M, as shares of the bytes that the solution without a bound keeps.
_SHARES = (1, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16, 1 / 64)
_MOST_POINTS = 8  # the most values of M in `offload_proposals`
# The weight of seconds in `lean_proposals`. It breaks ties, but never outweighs a matrix product.
_TIE = 1e-4
# The cost of all bytes, and of each name, in the program's unit of time. These costs break ties.
_BYTES_TIE, _NAMES_TIE = 1e-6, 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """Values that one policy keeps together.

    Attributes:
      policy: The policy.
      values: The values that the policy keeps.
      seconds: Seconds that keeping the values takes.
    """

    policy: Policy
    values: tuple[Value, ...]
    seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        """The bytes of all values."""
        return sum(value.nbytes for value in self.values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """A block's forward pass as the program sees it.

    Attributes:
      steps: The steps that some residual depends on, in order.
      seconds: Seconds of recomputing each step.
      residuals: The values that the backward pass reads, except inputs of the block.
      results: The values that the block returns, except inputs of the block.
      units: The values that a plan can keep.
    """

    steps: tuple[Step, ...]
    seconds: tuple[float, ...]
    residuals: tuple[Value, ...]
    results: tuple[Value, ...] = ()
    units: tuple[Unit, ...]

    @classmethod
    def of(cls, stack: Stack, rates: Rates, *, with_results: bool = False) -> "Graph":
        """Returns the graph of a stack's block.

        Args:
          stack: The stack.
          rates: The rates of the chip.
          with_results: Whether the graph also has the block's results and their steps.
        """
        block = lambda carry, params_i, consts: stack.call(carry, params_i, consts)
        given = (stack.params_i, stack.carry, (stack.consts,))
        try:
            trace = Trace(all_named(block, opens_remat=True), *given)
        except Exception:  # JAX cannot evaluate some blocks from their equations
            _LOG.debug("values without a tag cannot be named", exc_info=True)
            trace = Trace(block, *given)
        residuals = [r.origin for r in trace.residuals if r.origin.step is not None]
        results = trace.results if with_results else ()
        asked = (*trace.flat.outputs, *results)
        steps = dataclasses.replace(trace.flat, outputs=asked).live_steps()
        made = (origin_of(value) for value in results)
        return cls(
            steps=tuple(steps),
            seconds=tuple(_seconds(step, rates) for step in steps),
            residuals=tuple(dict.fromkeys(residuals)),
            results=tuple(dict.fromkeys(value for value in made if value.step is not None)),
            units=tuple(_units(trace, set(steps), rates)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
    """The seconds of a block's passes, and the figures of moving its input to the host.

    Attributes:
      forward_seconds: Seconds of the forward pass.
      backward_seconds: Seconds of the backward pass without recomputation.
      carry_bytes: The bytes of the block's input.
      link: The device's link to the host.
    """

    forward_seconds: float
    backward_seconds: float
    carry_bytes: float
    link: HostLink


def proposals(graph: Graph) -> Iterator[tuple[Policy, ...]]:
    """Yields the sets of policies on the frontier, from most kept bytes to least."""
    if not graph.units:
        return
    program = Program(graph)
    room = most = program.all_bytes
    for share in _SHARES:
        room = min(room, share * most)
        found = program.solve(room) if room >= 0 else None
        if found is None:
            return
        policies, used, _ = found
        yield policies
        most = used if share == 1 else most
        room = used - program.grain / 2


def lean_proposals(graph: Graph, rates: Rates) -> Iterator[tuple[Policy, ...]]:
    """Yields sets of policies over a user's own names, from most kept bytes to least.

    Args:
      graph: The graph of a block.
      rates: The rates of the chip.
    """
    products = [float(step_flops(step)) / rates.flops_per_second for step in graph.steps]
    seconds = (p + _TIE * s for p, s in zip(products, graph.seconds, strict=True))
    named = (unit for unit in graph.units if not any(map(words.is_invented, unit.policy.names)))
    units = tuple(dataclasses.replace(unit, seconds=0.0) for unit in named)
    yield from proposals(dataclasses.replace(graph, seconds=tuple(seconds), units=units))


def offload_proposals(
    graph: Graph, passes: Passes, most_bytes: float
) -> Iterator[tuple[Policy, ...]]:
    """Yields sets of policies that move a value to the host, from most kept bytes to least.

    Args:
      graph: The graph of a block.
      passes: The passes of the block.
      most_bytes: The most bytes that one block may keep on the host.
    """
    program = Program(graph, passes, most_bytes)
    room = program.all_bytes
    step = max(room / _MOST_POINTS, 1.0)
    while room >= 0:
        found = program.solve(room)
        if found is None:  # the block's input does not fit and cannot be moved
            return
        policies, used, _ = found
        if any(policy.kind == "offload" for policy in policies):
            yield policies
        room = min(used - program.grain / 2, room - step)


class Solution(NamedTuple):
    """A solution of the program.

    Attributes:
      policies: The policies.
      used: The bytes kept on the device.
      again: For each step of the graph, 1 if it is recomputed, else 0.
    """

    policies: tuple[Policy, ...]
    used: float
    again: np.ndarray


class Program:
    """The program's matrix, built once; only M changes between solutions.

    The columns are recomputed steps and kept units. With `passes`, further columns are the moved
    input, moved units and the wait of each pass for the link.

    Attributes:
      all_bytes: The bytes of all units and of the block's input.
      grain: The bytes of the program's unit.
    """

    def __init__(self, graph: Graph, passes: Passes | None = None, most_bytes: float = 0.0):
        offload = lambda *names: Policy(kind="offload", names=names)
        movable, moved, self._carry_bytes = [], [], 0.0
        if passes is not None:
            movable = [n for n, unit in enumerate(graph.units) if unit.policy.kind == "names"]
            moved = [Unit(policy=offload(words.CARRY), values=())]
            for unit in map(graph.units.__getitem__, movable):
                moved.append(dataclasses.replace(unit, policy=offload(*unit.policy.names)))
            self._carry_bytes = passes.carry_bytes
        self._choices = [*graph.units, *moved]
        first, host = len(graph.steps), len(graph.steps) + len(graph.units)
        end = first + len(self._choices)
        self._chosen = slice(first, end)
        # Each column's device bytes, host bytes and seconds of the backward pass.
        self._device, on_host, seconds = np.zeros((3, end + 2 * bool(moved)))
        self._device[first:host] = [unit.nbytes for unit in graph.units]
        on_host[host:end] = [unit.nbytes for unit in moved]
        if moved:
            self._device[host], on_host[host] = -self._carry_bytes, self._carry_bytes
        seconds[:end] = [*graph.seconds, *(unit.seconds for unit in self._choices)]
        self.all_bytes = sum(unit.nbytes for unit in graph.units) + self._carry_bytes
        self.grain = grain([*self._device[first:host], self._carry_bytes])
        self._upper = np.where(np.arange(len(seconds)) < end, 1.0, np.inf)
        self._whole = np.zeros(len(seconds))
        self._whole[self._chosen] = 1

        rows = self._needs(graph)
        for place, unit in enumerate(movable, 1):
            rows.append(({first + unit: -1.0, host + place: -1.0}, -1.0))
        self._needed = _at_least(rows, len(seconds))
        self._at_most: list[tuple[np.ndarray, float]] = []
        scale, waits = max(graph.seconds, default=0.0) or 1.0, np.zeros(len(seconds))
        if passes is not None:
            scale = passes.forward_seconds + passes.backward_seconds
            waits, self._at_most = _waits(passes, on_host, seconds, scale)
            self._at_most.append((on_host / self.grain, most_bytes / self.grain))
        # Of sets with equal cost, the solver takes the smallest, then the set with fewest names.
        size = np.maximum(self._device, 0.0) + 2 * on_host
        tie = _BYTES_TIE * size / max(self.all_bytes, 1.0) + _NAMES_TIE * self._whole
        self._cost = seconds / scale + waits + tie

    def _needs(self, graph: Graph) -> list[tuple[dict[int, float], float]]:
        """Returns rows with lower bounds, which say that each value read is kept or recomputed."""
        place: dict[Step | None, int] = {step: n for n, step in enumerate(graph.steps)}
        serving: dict[Value, list[int]] = {}
        for n, unit in enumerate(self._choices, len(place)):
            for value in unit.values:
                serving.setdefault(value, []).append(n)
        there = lambda value: dict.fromkeys([place[value.step], *serving.get(value, ())], 1.0)
        rows = [(there(value), 1.0) for value in graph.residuals]
        for n, step in enumerate(graph.steps):
            for value in dict.fromkeys(map(origin_of, step.inputs)):
                if value.step in place:
                    row = there(value)
                    row[n] = row.get(n, 0.0) - 1.0
                    rows.append((row, 0.0))
        return rows

    def solve(self, room: float) -> Solution | None:
        """Returns the best policies within `room` bytes on the device; None if no set fits."""
        from scipy.optimize import LinearConstraint

        within = (self._device / self.grain, (room - self._carry_bytes) / self.grain)
        rows, most = map(np.array, zip(*self._at_most, within, strict=True))
        constraints = [*self._needed, LinearConstraint(rows, ub=cast(Any, most))]
        found = minimize(self._cost, constraints, upper=self._upper, integrality=self._whole)
        if found is None:
            return None
        chosen = np.round(found[self._chosen])
        policies = [unit.policy for unit in itertools.compress(self._choices, chosen)]
        kept = [policy for policy in policies if policy.kind != "offload"]
        names = [name for policy in policies if policy not in kept for name in policy.names]
        if names:
            kept.append(Policy(kind="offload", names=tuple(names)))
        used = float(self._device[self._chosen] @ chosen) + self._carry_bytes
        return Solution(tuple(kept), used, found[: self._chosen.start])


def _waits(passes: Passes, on_host: np.ndarray, seconds: np.ndarray, scale: float):
    """Returns each column's cost of waiting for the link, and rows with their upper bounds.

    Args:
      passes: The passes of the block.
      on_host: Bytes on the host of each column; the last two columns are the waits.
      seconds: Seconds that each column adds to the backward pass.
      scale: The seconds of the program's unit of time.
    """
    link = on_host / passes.link.bytes_per_second / scale
    forward, backward = np.eye(len(link))[-2:]
    if not passes.link.overlaps:
        return 2 * link, []
    rows = [
        (link - forward, passes.forward_seconds / scale),
        (link - seconds / scale - backward, passes.backward_seconds / scale),
    ]
    return forward + backward, rows


def _at_least(rows: Sequence[tuple[dict[int, float], float]], width: int) -> list[Any]:
    """Returns a list with the constraint of rows' lower bounds; an empty list without rows."""
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

    entries = [(n, column, x) for n, (row, _) in enumerate(rows) for column, x in row.items()]
    if not entries:
        return []
    where_row, where_column, values = zip(*entries, strict=True)
    matrix: Any = csr_array((values, (where_row, where_column)), shape=(len(rows), width))
    least: Any = np.array([least for _, least in rows])
    return [LinearConstraint(matrix, lb=least)]


def _units(trace: Trace, live: set[Step], rates: Rates) -> Iterator[Unit]:
    """Yields the units that a plan can keep and that the backward pass depends on."""
    kernel = _kept_by_attention(trace)
    by_name = values_by_name(trace.flat)
    for value, names in trace.tags.items():
        for name in names:
            by_name[name] = (*by_name.get(name, ()), value)
    found: list[tuple[Policy, Sequence[Value]]] = []
    if kernel:
        found.append((Policy(kind="attention"), kernel))
    for name, values in by_name.items():
        if words.is_invented(name):  # a value with a user's tag is named by that tag
            values = [v for v in values if v not in trace.tags and v not in kernel]
        found.append((Policy(kind="names", names=(name,)), values))
    for policy, values in found:
        values = tuple(value for value in dict.fromkeys(values) if value.step in live)
        moved = _KEEPING_SHARE * sum(value.nbytes for value in values)
        seconds = moved / (rates.bytes_per_second * BYTES_EFFICIENCY)
        if values and not any(map(_is_complex, values)):  # jax.checkpoint keeps no complex value
            yield Unit(policy=policy, values=values, seconds=seconds)


def _is_complex(value: Value) -> bool:
    return jnp.issubdtype(value.aval.dtype, jnp.complexfloating)


def _kept_by_attention(trace: Trace) -> list[Value]:
    """Returns the values that the policy `attention` keeps of a block."""
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


_INFEASIBLE, _FAILED = 2, 4  # status codes of scipy's milp
_FINEST = 2.0**-20  # the least unit, as a share of all bytes


def grain(sizes: Sequence[float]) -> float:
    """Returns the bytes of a program's unit: the greatest common divisor of sizes, unless tiny.

    For the program, two sets of values are equal if their bytes differ by less than one unit.
    """
    common = math.gcd(*map(round, sizes)) if len(sizes) else 1
    return max(float(common), _FINEST * sum(sizes), 1.0)


def minimize(cost, constraints, *, upper: Any, integrality) -> np.ndarray | None:
    """Returns a point of least cost with `0 <= x <= upper`; None if no point meets the constraints.

    Args:
      cost: The cost of each column.
      constraints: A list of `scipy.optimize.LinearConstraint`.
      upper: One bound for all columns, or an array with a bound for each column.
      integrality: For each column, 1 if it is a whole number, else 0.

    Raises:
      RuntimeError: The solver gave up.
    """
    from scipy.optimize import Bounds, milp

    options = {"mip_rel_gap": 0.0}
    asked: dict[str, Any] = {"bounds": Bounds(0, upper), "integrality": integrality}
    found = milp(cost, constraints=constraints, options=options, **asked)
    if found.status == _FAILED:  # the tolerance of presolving can make it fail
        options["presolve"] = False
        found = milp(cost, constraints=constraints, options=options, **asked)
    if found.status == _INFEASIBLE:
        return None
    if found.x is None:
        raise RuntimeError(f"the program of a block has no answer: {found.message}")
    return found.x
