"""Edits of jaxprs, one equation at a time: tagged, opened, replaced.

Nothing is traced again but the equation itself, so what an edited jaxpr computes, and where in the
user's code each step of it was written, stays as it was.
"""

import copy
import functools
from collections.abc import Callable, Sequence

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from jaxckpt.transforms import jaxprs


def is_var(atom) -> bool:
    """Returns whether an atom of a jaxpr is a variable rather than a literal."""
    return isinstance(atom, core.Var)


def tag_after(equation, variables: Sequence, tag: str) -> list:
    """Returns an equation, and after it the tags of some of its outputs.

    The outputs are the tagged ones; what the equation itself returns gets other variables.
    """
    fresh = {var: copy.copy(var) for var in variables}
    made = equation.replace(outvars=[fresh.get(var, var) for var in equation.outvars])
    template, place = _tag_equation(tag), equation.source_info
    return [made] + [
        template.replace(invars=[inner], outvars=[outer], source_info=place)
        for outer, inner in fresh.items()
    ]


def tag_variables(jaxpr: core.Jaxpr, variables: Sequence, tag: str) -> core.Jaxpr:
    """Returns a jaxpr with a tag on some variables, of those that an equation makes."""
    made = []
    for equation in jaxpr.eqns:
        found = [var for var in dict.fromkeys(variables) if var in equation.outvars]
        made += tag_after(equation, found, tag) if found else [equation]
    return jaxpr if len(made) == len(jaxpr.eqns) else jaxpr.replace(eqns=made)


@functools.cache
def _tag_equation(tag: str):
    """Returns the equation of a tag, to be given other variables."""
    (made,) = jax.make_jaxpr(lambda x: checkpoint_name(x, tag))(0.0).eqns
    return made


def alone(jaxpr: core.Jaxpr, equation) -> tuple[Callable, list]:
    """Returns one equation as a function that returns a list, and its arguments' variables."""
    inputs = list(dict.fromkeys(filter(is_var, equation.invars)))
    # Outputs that nobody reads have variables that cannot be read.
    outputs = [var if type(var) is core.Var else core.Var(var.aval) for var in equation.outvars]
    made = equation.replace(outvars=outputs)
    only = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=[made])
    return core.jaxpr_as_fun(core.ClosedJaxpr(only, ())), inputs


def replaced(equation, inputs: Sequence, call: Callable):
    """Returns `call(*inputs)`, which must be traced to one equation, in the place of another."""
    traced = jax.make_jaxpr(lambda *args: call(*args))(*(var.aval for var in inputs)).jaxpr
    (made,) = traced.eqns
    outer = dict(zip(traced.invars, inputs, strict=True))
    places = dict(zip(traced.outvars, equation.outvars, strict=True))
    return made.replace(
        invars=[outer[v] if is_var(v) else v for v in made.invars],
        outvars=[places.get(v, v) for v in made.outvars],
        source_info=equation.source_info,
    )


def as_call(equation):
    """Returns a `jax.checkpoint` or a custom derivative's function as a plain call."""
    called = next(jaxprs.subjaxprs(equation))
    closed = called if isinstance(called, core.ClosedJaxpr) else core.ClosedJaxpr(called, ())
    avals = [var.aval for var in equation.invars]
    (made,) = jax.make_jaxpr(jax.jit(core.jaxpr_as_fun(closed)))(*avals).eqns
    return made.replace(invars=list(equation.invars), outvars=list(equation.outvars))


def tag_result(jaxpr: core.Jaxpr, equation, tag: str):
    """Returns an equation with one output whose derivative, too, reads the tagged output.

    The derivative of tanh is a function of its result: with a tag behind the step alone, keeping
    the tagged value would not spare that step in the backward pass.
    """
    run, inputs = alone(jaxpr, equation)

    @jax.custom_jvp
    def call(*args):
        return [checkpoint_name(out, tag) for out in run(*args)]

    @call.defjvp
    def _(primals, tangents):
        both = jax.make_jaxpr(lambda *args: jax.jvp(run, *args))(tuple(primals), tuple(tangents))
        made = tag_variables(both.jaxpr, both.jaxpr.outvars[:1], tag)
        out, tangent = core.jaxpr_as_fun(both.replace(jaxpr=made))(*primals, *tangents)
        return [out], [tangent]

    return replaced(equation, inputs, call)


def forward_rule(jaxpr: core.Jaxpr, equation):
    """Returns the forward rule of a `custom_vjp` equation, and what `with_rule` needs of it.

    Returns:
      `(rule, tree, inputs, run)`: the rule's jaxpr, whose outputs are the function's and then the
      leaves of its reversal; that reversal's structure; the arguments' variables; the function.
    """
    run, inputs = alone(jaxpr, equation)
    trees = []

    def forward(*args):
        out, reverse = jax.vjp(run, *args)
        leaves, tree = jax.tree.flatten(reverse)
        trees.append(tree)
        return [*out, *leaves]

    rule = jax.make_jaxpr(forward)(*(var.aval for var in inputs))
    return rule, trees[-1], inputs, run


def with_rule(run: Callable, rule: core.ClosedJaxpr, count: int, tree) -> Callable:
    """Returns a function under a `custom_vjp` with the given forward rule.

    Args:
      run: The function.
      rule: As from `forward_rule`.
      count: How many outputs the function has.
      tree: As from `forward_rule`.
    """
    run_rule = core.jaxpr_as_fun(rule)

    @jax.custom_vjp
    def call(*args):
        return run(*args)

    def forward(*args):
        made = run_rule(*args)
        return made[:count], jax.tree.unflatten(tree, made[count:])

    call.defvjp(forward, lambda reverse, grads: reverse(list(grads)))
    return call
