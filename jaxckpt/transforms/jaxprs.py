"""Reading jaxprs: every equation of a function, those inside its calls and loops too."""

from collections.abc import Callable, Iterator

import jax
from jax.extend import core

# `jax.checkpoint`, by all names its primitive had.
REMATS = ("remat", "remat2", "checkpoint")


def linearized(fn: Callable, *args) -> core.ClosedJaxpr:
    """Returns the jaxpr of `fn`'s forward pass as reverse-mode differentiation runs it.

    The plain jaxpr hides what a `jax.custom_vjp` does in its forward rule (tags and kernels among
    it); under `jax.vjp` that rule is what is traced. Nothing is computed.

    Args:
      fn: A function of pytrees of arrays.
      *args: Its arguments, arrays or `jax.ShapeDtypeStruct`s.
    """
    return jax.make_jaxpr(lambda *args: jax.vjp(fn, *args))(*args)


def equations(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Yields every equation, outer ones first, then those of the jaxprs in its parameters."""
    if isinstance(jaxpr, core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    for equation in jaxpr.eqns:
        yield equation
        for inner in subjaxprs(equation):
            yield from equations(inner)


def subjaxprs(equation: core.JaxprEqn) -> Iterator[core.ClosedJaxpr | core.Jaxpr]:
    """Yields the jaxprs in an equation's parameters: a loop's body, a call's, a cond's branches."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr | core.Jaxpr):
                yield item
