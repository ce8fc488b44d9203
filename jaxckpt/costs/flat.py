"""A jaxpr without calls: one list of steps, in which each value knows the step that makes it.

    flat = flatten(jax.make_jaxpr(fn)(*args))
    [step.name for step in flat.steps]

Calls (`jit`, `jax.checkpoint`, custom derivatives) are replaced by the steps of their functions, so
a value can be followed across them. Loops, branches and kernels stay steps; `bodies` opens them. A
constant of the jaxpr stays known as a value's `constant`, inside loops too. `where` returns the
line of the user's code that wrote a step.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.extend import core

from jaxckpt.sources import is_machinery
from jaxckpt.transforms import jaxprs


@dataclasses.dataclass(eq=False)
class Value:
    """One array of the program; values are compared by identity.

    Attributes:
      aval: Shape and dtype.
      step: The step that makes it; None for an input or a constant.
      constant: The array or scalar itself if the value is a constant, else None.
    """

    aval: Any
    step: "Step | None" = None
    constant: Any = None

    @property
    def nbytes(self) -> int:
        """The array's bytes; 0 for a token or a reference."""
        return nbytes(self.aval)


@dataclasses.dataclass(eq=False, kw_only=True)
class Step:
    """One equation with its inputs and outputs as values; `calls` lead to it, outermost first."""

    equation: core.JaxprEqn
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...] = ()
    calls: tuple[core.JaxprEqn, ...] = ()

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.equation.primitive.name

    @property
    def params(self) -> dict:
        """The equation's parameters."""
        return self.equation.params


@dataclasses.dataclass(eq=False, kw_only=True)
class Flat:
    """A whole function: `inputs`, `constants` it closes over, `steps` in order, `outputs`."""

    inputs: tuple[Value, ...]
    constants: tuple[Value, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Value, ...]

    def live_steps(self) -> list[Step]:
        """Returns the steps that the outputs or an effect depend on, in order."""
        needed, live = set(self.outputs), []
        for step in reversed(self.steps):
            if step.equation.effects or not needed.isdisjoint(step.outputs):
                live.append(step)
                needed.update(step.inputs)
        return live[::-1]


def flatten(
    jaxpr: core.ClosedJaxpr | core.Jaxpr, inputs: Sequence[Value | None] | None = None
) -> Flat:
    """Returns a jaxpr as a `Flat`, with the values of `inputs`; None stands for a new value."""
    consts = jaxpr.consts if isinstance(jaxpr, core.ClosedJaxpr) else ()
    body = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    fresh = [Value(var.aval) for var in body.invars]
    pairs = zip(inputs or [None] * len(fresh), fresh, strict=True)
    inputs = tuple(given or made for given, made in pairs)
    known = list(consts) or [None] * len(body.constvars)
    constants = [Value(var.aval, constant=c) for var, c in zip(body.constvars, known, strict=True)]
    steps = []
    outputs = _inline(body, constants, inputs, (), steps)
    return Flat(
        inputs=inputs, constants=tuple(constants), steps=tuple(steps), outputs=tuple(outputs)
    )


def bodies(step: Step) -> Iterator[Flat]:
    """Yields the functions in a step's parameters: a loop's body, a cond's branches, a kernel."""
    for jaxpr in jaxprs.subjaxprs(step.equation):
        open_jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
        shared: list[Value | None] = [None] * len(open_jaxpr.invars)
        if step.name == jaxprs.SCAN:
            # Only the loop's consts stay constant; carries and rows change from trip to trip.
            for place in range(_scan_consts(step, open_jaxpr)):
                value = step.inputs[place]
                shared[place] = Value(value.aval, constant=value.constant)
        if step.name == jaxprs.SHARD_MAP:
            # A constant that every device holds whole is the same constant inside.
            for place, (value, var) in enumerate(zip(step.inputs, open_jaxpr.invars, strict=True)):
                if value.constant is not None and value.aval.shape == _aval(var).shape:
                    shared[place] = Value(var.aval, constant=value.constant)
        yield flatten(jaxpr, shared)


def _scan_consts(step: Step, body: core.Jaxpr) -> int:
    """Returns how many of a scan's leading inputs are equal in every trip.

    JAX's releases store the numbers of constants, carries and rows in different ways. Ranks work in
    all releases: only rows lose their leading axis.
    """
    same = lambda value, var: value.aval.ndim == _aval(var).ndim
    rows = len(step.inputs) - sum(map(same, step.inputs, body.invars))
    return len(step.inputs) - rows - sum(map(same, step.outputs, body.outvars))


def _aval(var: Any) -> Any:
    return var.aval  # JAX's type of it has no shape, so the return type is Any


def nbytes(aval) -> int:
    """Returns the bytes of an abstract array; 0 for a token or a reference."""
    shape, dtype = getattr(aval, "shape", None), getattr(aval, "dtype", None)
    if shape is None or dtype is None:
        return 0
    return math.prod(shape) * dtype.itemsize


def _inline(jaxpr: core.Jaxpr, constants, inputs, calls, steps: list) -> list[Value]:
    """Appends the steps of `jaxpr` to `steps` and returns the values of its outputs."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def read(atom) -> Value:
        if isinstance(atom, core.Literal):
            return Value(atom.aval, constant=atom.val)
        return env[atom]

    for equation in jaxpr.eqns:
        values, called = tuple(map(read, equation.invars)), None
        platforms = equation.params.get("branches_platforms")
        if platforms is not None:
            # The default branch of `jax.lax.platform_dependent`; the last if it has none.
            default = platforms.index(None) if None in platforms else -1
            called, values = equation.params["branches"][default], values[1:]
        elif equation.primitive.name in jaxprs.CALLS:
            inner = next(jaxprs.subjaxprs(equation))
            called = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
        if called is not None:
            pairs = zip(called.jaxpr.constvars, called.consts, strict=True)
            inner = [Value(var.aval, constant=constant) for var, constant in pairs]
            outputs = _inline(called.jaxpr, inner, values, (*calls, equation), steps)
        else:
            step = Step(equation=equation, inputs=values, calls=calls)
            step.outputs = outputs = tuple(Value(var.aval, step) for var in equation.outvars)
            steps.append(step)
        env.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def where(step: Step) -> str:
    """Returns `file.py:123`, the innermost line outside of libraries; `""` if unknown.

    JAX traces some of its functions once and caches them (`jax.nn.silu`), with the line of their
    first caller. Their steps get the line of the call at hand instead.
    """
    equations = [*step.calls, step.equation]
    while len(equations) > 1 and _is_library_call(equations[-2], equations[-1]):
        equations.pop()
    for frame in _frames(equations[-1]):
        if not is_machinery(frame.file_name):
            return f"{Path(frame.file_name).name}:{frame.line_num}"
    return ""


def _is_library_call(call, equation) -> bool:
    """Whether the function that `call` runs belongs to a library."""
    name = call.params.get("name")
    for frame in _frames(equation):
        if not is_machinery(frame.file_name):
            return False
        if frame.function_name.rpartition(".")[2] == name:
            return True
    return False


def _frames(equation) -> list:
    traceback = equation.source_info.traceback
    return list(traceback.frames) if traceback is not None else []
