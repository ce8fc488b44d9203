"""Inside a block: which values to keep, which to move to the host and back, by an exact program.

It is the program of `frontier.py` with one more choice for each value that a plan can name, and for
the block's input: to move it, out in the forward pass and back in the backward pass. Where the link
to the host runs beside the computation, each pass takes the longer of the two:

    minimize    forward + backward
    subject to  forward  >= F,  forward  >= moved bytes / link,  backward >= moved bytes / link
                backward >= B + sum of seconds[s] * rerun[s]
                              + sum of keeping[v] * (kept[v] + moved[v])
                rerun[maker(v)] + kept[v] + moved[v] >= 1          for each residual v
                rerun[maker(v)] + kept[v] + moved[v] >= rerun[s]   for each input v of each step s
                kept[v] + moved[v] <= 1
                kept bytes, the block's input where it stays among them, <= M
                moved bytes <= H

Where it does not, `moved bytes / link` is added to both passes instead.

What is found are proposals, as in `frontier.py`. An attention kernel's arrays have no name of
their own, so they are kept or made again.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxckpt.memory.host_link import HostLink
from jaxckpt.planner.frontier import Graph, Program
from jaxckpt.planner.integer_program import grain, minimize
from jaxckpt.plans import Policy, words

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
