"""FLOPs of a function, counted from its jaxpr.

XLA's own cost analysis counts a loop's body once; here a `scan` counts it times its length, so a
recomputed block shows. Matrix products and convolutions are counted, two operations a
multiply-add; elementwise work is left out, as in the usual model-FLOPs figures.
"""

import math
from fractions import Fraction

from jax.extend import core

from jaxckpt.transforms.jaxprs import subjaxprs
from jaxckpt.transforms.trips import mean_trips


def count_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> int:
    """Returns the FLOPs of all matrix products and convolutions in a jaxpr.

    A `cond` counts its most expensive branch. A `while` loop's trip count is not in the jaxpr:
    the executor's loops say theirs, the body of any other counts once.
    """
    return int(_total(jaxpr))


def _total(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> Fraction | int:
    if isinstance(jaxpr, core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return sum(_flops(equation) for equation in jaxpr.eqns)


def _flops(equation: core.JaxprEqn) -> Fraction | int:
    name = equation.primitive.name
    if name == "dot_general":
        return _dot_flops(equation)
    if name == "conv_general_dilated":
        return _conv_flops(equation)
    inner = [_total(jaxpr) for jaxpr in subjaxprs(equation)]
    if name == "cond":
        return max(inner, default=0)
    if name == "scan":
        return sum(inner) * equation.params["length"]
    return sum(inner) * (mean_trips(equation) if name == "while" else 1)


def _dot_flops(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * depth * math.prod(equation.outvars[0].aval.shape)


def _conv_flops(equation: core.JaxprEqn) -> int:
    kernel = equation.invars[1].aval.shape
    out_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_features
