"""A function's jaxpr as a list of steps, cut into segments that run one after another.

    opened = Opened.of(traced.jaxpr)
    opened.graph, len(opened.jaxpr.eqns)          # what a graph's plan is bound to

A step is one equation. The equations inside a `jit` are steps of their own. Custom rules, kernels,
loops, branches and `jax.checkpoint` are one step each. A segment is a run of consecutive steps. Its
inputs are the values that it reads. Its outputs are the values that later steps read, or that the
function returns; a value may skip segments, as in a U-Net. Names such as `@dot.2` count from the
start of their segment.

Two digests identify a function: one of its steps' primitives in order, one of all shapes and
dtypes. Both are equal in every process on one release of JAX.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import jax
from jax.extend import core

from jaxckpt.plans import Plan
from jaxckpt.transforms import jaxprs
from jaxckpt.transforms.traced_block import TracedBlock
from jaxckpt.transforms.value_names import is_var

_DIGITS = 6


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """A run of steps as a block.

    Attributes:
      block: The segment as a block; its carry has the values of the segment's inputs, in order.
      inputs: The variables that the segment reads.
      outputs: The variables of the segment that later steps or the function's result read.
    """

    block: TracedBlock
    inputs: tuple[core.Var, ...]
    outputs: tuple[core.Var, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A function without `jit`s.

    Attributes:
      jaxpr: From the function's leaves to the leaves of its result; it has no constants.
    """

    jaxpr: core.Jaxpr

    @classmethod
    def of(cls, closed: core.ClosedJaxpr) -> "Opened":
        """Returns the function of a jaxpr whose constants are arguments, as `trace_block` makes."""
        assert not closed.consts, "constants are arguments"
        steps: list[core.JaxprEqn] = []
        places = {var: var for var in closed.jaxpr.invars}
        outvars = _open(closed.jaxpr, places, steps)
        names = closed.jaxpr.debug_info.with_unknown_names()
        return cls(jaxpr=closed.jaxpr.replace(eqns=steps, outvars=outvars, debug_info=names))

    @classmethod
    def of_chain(cls, blocks: Sequence[TracedBlock]) -> tuple["Opened", tuple[int, ...]]:
        """Returns different blocks one after another as one function, and the end of each block.

        Args:
          blocks: Blocks without parameters; the output of each is the carry of the next block.

        Returns:
          `(opened, ends)`. The function takes the leaves of the first carry, then the consts of
          each block. `ends` has the number of steps before the first block (0), before the second
          block, and so on; its last entry is the number of all steps.
        """
        steps: list[core.JaxprEqn] = []
        values: list = [core.Var(aval) for aval in blocks[0].inputs[0]]
        invars, ends = list(values), [0]
        for block in blocks:
            inner = block.jaxpr.jaxpr
            own = [core.Var(aval) for aval in block.inputs[2]]
            invars += own
            values = _open(inner, dict(zip(inner.invars, [*values, *own], strict=True)), steps)
            ends.append(len(steps))
        first = blocks[0].jaxpr.jaxpr
        jaxpr = first.replace(invars=invars, outvars=values, eqns=steps)
        names = jaxpr.debug_info.with_unknown_names()
        return cls(jaxpr=jaxpr.replace(debug_info=names)), tuple(ends)

    @property
    def num_steps(self) -> int:
        """The number of steps."""
        return len(self.jaxpr.eqns)

    @functools.cached_property
    def graph(self) -> str:
        """The digests of the function, as in a plan's text: `steps-values`."""
        names = (equation.primitive.name for equation in self.jaxpr.eqns)
        groups = (self.jaxpr.invars, *(equation.outvars for equation in self.jaxpr.eqns))
        values = (f"{var.aval.str_short()}" for group in groups for var in group)
        return "-".join(
            hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_DIGITS]
            for lines in (names, values)
        )

    @functools.cached_property
    def last_reads(self) -> dict[core.Var, int]:
        """For each variable, the last step that reads it; `num_steps` if it is returned."""
        found = {}
        for place, equation in enumerate(self.jaxpr.eqns):
            found.update(dict.fromkeys(filter(is_var, equation.invars), place))
        found.update(dict.fromkeys(filter(is_var, self.jaxpr.outvars), self.num_steps))
        return found

    @functools.cached_property
    def dependent(self) -> frozenset:
        """The variables that depend on an input."""
        found = set(self.jaxpr.invars)
        for equation in self.jaxpr.eqns:
            if any(is_var(atom) and atom in found for atom in equation.invars):
                found.update(equation.outvars)
        return frozenset(found)

    def segment(self, start: int, stop: int) -> Segment:
        """Returns the segment of steps `start..stop-1`."""
        steps = self.jaxpr.eqns[start:stop]
        made = {var for step in steps for var in step.outvars}
        read = dict.fromkeys(v for step in steps for v in step.invars if is_var(v))
        inputs = tuple(v for v in read if isinstance(v, core.Var) and v not in made)
        last = self.last_reads
        outputs = tuple(var for step in steps for var in step.outvars if last.get(var, -1) >= stop)
        jaxpr = self.jaxpr.replace(invars=list(inputs), outvars=list(outputs), eqns=steps)
        jaxpr = jaxpr.replace(debug_info=jaxpr.debug_info.with_unknown_names())
        block = TracedBlock(
            jaxpr=core.ClosedJaxpr(jaxpr, ()),
            counts=(len(inputs), 0, 0),
            out_tree=jax.tree.structure([0] * len(outputs)),
        )
        return Segment(block=block, inputs=inputs, outputs=outputs)

    def segments(self, plan: Plan) -> tuple[Segment, ...]:
        """Returns the segments of a bound plan of this graph."""
        start, found = 0, []
        for stage in plan.stages:
            found.append(self.segment(start, start + stage.bound_count))
            start += stage.bound_count
        return tuple(found)

    def run(self, segments: Sequence[Segment], calls: Sequence, leaves: Sequence) -> list:
        """Returns the function's result; each segment runs by its own `call(values) -> values`."""
        held = dict(zip(self.jaxpr.invars, leaves, strict=True))
        for segment, call in zip(segments, calls, strict=True):
            made = call([held[var] for var in segment.inputs])
            held.update(zip(segment.outputs, made, strict=True))
        read = lambda atom: held[atom] if is_var(atom) else atom.val
        return [read(atom) for atom in self.jaxpr.outvars]


def _open(jaxpr: core.Jaxpr, places: dict, steps: list) -> list:
    """Appends the steps of a jaxpr to `steps`; returns the jaxpr's outputs.

    Args:
      jaxpr: The jaxpr.
      places: For each variable of the jaxpr, the variable or literal that replaces it.
      steps: The steps of the whole function so far.
    """
    there = lambda atom: places[atom] if is_var(atom) else atom
    for equation in jaxpr.eqns:
        inner = _opened(equation)
        inputs = list(map(there, equation.invars))
        if inner is not None:
            made = _open(inner, dict(zip(inner.invars, inputs, strict=True)), steps)
            places.update(zip(equation.outvars, made, strict=True))
            continue
        # One jaxpr may be called from several places: each needs variables of its own.
        fresh = {v: core.Var(v.aval) for v in equation.outvars if type(v) is core.Var}
        places.update(fresh)
        outvars = [fresh.get(v, v) for v in equation.outvars]
        steps.append(equation.replace(invars=inputs, outvars=outvars))
    return list(map(there, jaxpr.outvars))


def _opened(equation: core.JaxprEqn) -> core.Jaxpr | None:
    """Returns the function of a `jit` that only groups steps; None for any other equation."""
    if equation.primitive.name not in jaxprs.JITS or jaxprs.places_arrays(equation):
        return None
    closed = next(jaxprs.subjaxprs(equation))
    if isinstance(closed, core.ClosedJaxpr):
        return None if closed.consts else closed.jaxpr
    return None if closed.constvars else closed
