"""Invented names for values that nobody tagged, so that a plan can say `names:@dot.2,@tanh.1`.

`@dot.2` is the result of the block's second matrix product. Each step of the block's jaxpr is named
by its primitive and counted in order, through `jit`, `scan`, `cond`, `shard_map`, `jax.checkpoint`
and the forward rule of a `jax.custom_vjp`. The same block has the same names in every process.
`named` puts tags at these places into the block's jaxpr; policies then treat them as a user's tags.
A user's tag has no `@`, so it is never an invented name.

Values without an invented name: views (a reshape, a transpose); random keys; values with a user's
tag; residuals of an attention kernel (the policy `attention` keeps them all); values that only the
derivative rule of a primitive or of a `jax.custom_jvp` makes; and casts of the block's parameters,
because some stacks make these outside the block. Names follow the jaxpr: another release of JAX may
count otherwise.

A tag is put in by editing the jaxpr, one equation at a time. Only that equation is traced again, so
the jaxpr computes the same and keeps its source lines.
"""

import copy
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from jaxckpt.plans import Policy, words
from jaxckpt.transforms import jaxprs, tags

_TRANSPARENT = frozenset((*jaxprs.JITS, *jaxprs.REMATS, jaxprs.SCAN, jaxprs.COND, jaxprs.SHARD_MAP))
_CUSTOM = (*jaxprs.CUSTOM_JVPS, *jaxprs.CUSTOM_VJPS)
# Views of an array: recomputing one costs nothing, so it needs no name.
_VIEWS = frozenset(
    (
        *(jaxprs.TAG, jaxprs.PUT, jaxprs.ROUND, jaxprs.BARRIER, *jaxprs.COPIES),
        *(jaxprs.BROADCAST, jaxprs.BITCAST, *jaxprs.SHAPES, *jaxprs.PLACEMENTS),
    )
)
_WORDS = {
    jaxprs.DOT: "dot",
    jaxprs.CONV: "conv",
    jaxprs.CAST: "cast",
    jaxprs.SELECT: "where",
    jaxprs.INTEGER_POWER: "pow",
}


def named(block: Callable, wants: Callable[[str], bool], *, opens_remat: bool = False) -> Callable:
    """Returns the same block, with a tag on each value whose invented name is wanted.

    Args:
      block: `block(carry, params_i, *consts)`, or a function of the carry alone.
      wants: `wants("@dot.2")` returns whether the values of that name get a tag.
      opens_remat: Removes any `jax.checkpoint` inside the block, to show what the block would keep
        without it.
    """

    def call(*args):
        leaves, tree = jax.tree.flatten(args)
        flat = lambda *leaves: block(*jax.tree.unflatten(tree, leaves))
        closed, out = jax.make_jaxpr(flat, return_shape=True)(*leaves)
        start, count = (len(jax.tree.leaves(args[n : n + 1])) for n in (0, 1))
        params = frozenset(closed.jaxpr.invars[start : start + count])
        edited = _Namer(wants, opens_remat, params).closed(closed)
        return jax.tree.unflatten(jax.tree.structure(out), core.jaxpr_as_fun(edited)(*leaves))

    return call


def counts(jaxpr: core.ClosedJaxpr) -> Counter:
    """Returns the number of names for each word, such as 3 for `dot` if `@dot.3` is the last."""
    namer = _Namer(lambda name: False, False, frozenset())
    namer.closed(jaxpr)
    return namer.counts


def resolved(block: Callable, policies: Iterable[Policy]) -> Callable:
    """Returns the block with a tag on each value that the policies name by `@...`."""
    patterns = [name for policy in policies for name in policy.names if words.is_invented(name)]
    if not patterns:
        return block
    return named(block, lambda name: any(words.matches(name, pattern) for pattern in patterns))


def offered(block: Callable, policies: Iterable[Policy], *args) -> tags.Tags:
    """Returns the tags of a block, with its invented names if a policy names any.

    Args:
      block: The block, without tags for invented names.
      policies: The policies to be checked.
      *args: The block's arguments, arrays or abstract.
    """
    if any(words.is_invented(name) for policy in policies for name in policy.names):
        block = named(block, lambda name: True)
    return tags.tags_of(block, *args)


class _Namer:
    """Puts tags into jaxprs, counting equations by their words in order."""

    def __init__(self, wants: Callable[[str], bool], opens_remat: bool, params: frozenset):
        self._wants = wants
        self._params = params
        self._opens_remat = opens_remat
        self.counts = Counter()
        self._in_rule = False
        self._literals: set[core.Var] = set()

    def closed(self, closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
        """Returns a closed jaxpr with tags; the same object if nothing in it is wanted."""
        edited = self._jaxpr(closed.jaxpr)
        return closed if edited is closed.jaxpr else closed.replace(jaxpr=edited)

    def _jaxpr(self, jaxpr: core.Jaxpr, unnamed=frozenset()) -> core.Jaxpr:
        """Returns an open jaxpr with tags, except on the variables in `unnamed`."""
        tagged = {e.invars[0] for e in jaxpr.eqns if e.primitive.name == jaxprs.TAG}
        made = [self._equation(jaxpr, e, tagged | unnamed) for e in jaxpr.eqns]
        flat = [equation for group in made for equation in group]
        if len(flat) == len(jaxpr.eqns) and all(map(_is, flat, jaxpr.eqns)):
            return jaxpr
        return jaxpr.replace(eqns=flat)

    def _equation(self, jaxpr, equation, unnamed) -> list:
        """Returns the equations that replace one equation of a jaxpr."""
        name = equation.primitive.name
        if (name in jaxprs.REMATS and self._opens_remat) or (name in _CUSTOM and self._in_rule):
            # Equations of a derivative rule are not differentiated again, so plain calls will do.
            plain = as_call(equation)
            opened = self._inside(plain)
            return [equation if opened is plain and name in _CUSTOM else opened]
        if name in _TRANSPARENT:
            return [self._inside(equation)]
        if name in jaxprs.CUSTOM_VJPS:
            return [self._opened(jaxpr, equation, unnamed)]
        return self._tagged(jaxpr, equation, unnamed)

    def _inside(self, equation):
        """Returns a call, loop or branch with tags in its functions."""
        edited = {}
        for key, value in equation.params.items():
            new = self._param(value)
            if new is not value:
                edited[key] = new
        return equation.replace(params=equation.params | edited) if edited else equation

    def _param(self, value):
        if isinstance(value, core.ClosedJaxpr):
            return self.closed(value)
        if isinstance(value, core.Jaxpr):
            return self._jaxpr(value)
        if isinstance(value, tuple) and any(isinstance(v, core.ClosedJaxpr) for v in value):
            new = tuple(map(self._param, value))
            return value if all(map(_is, new, value)) else new
        return value

    def _tagged(self, jaxpr, equation, unnamed) -> list:
        """Returns an equation, followed by the tags of its outputs if its name is wanted."""
        primitive = equation.primitive.name
        if not any(is_var(atom) and atom not in self._literals for atom in equation.invars):
            # The next trace folds the cast of a literal, and must count the same values.
            if primitive == jaxprs.CAST:
                self._literals.update(equation.outvars)
            return [equation]
        if primitive in _VIEWS:
            return [equation]
        if primitive == jaxprs.CAST and self._params.intersection(equation.invars):
            return [equation]
        tag = self._next_tag(equation)
        outputs = [var for var in equation.outvars if _is_array(var) and var not in unnamed]
        if tag is None or not outputs:
            return [equation]
        reads_result = primitive in jaxprs.RULES_READ_RESULT and not self._in_rule
        if reads_result and _is_inexact(equation):
            return [tag_result(jaxpr, equation, tag)]
        return tag_after(equation, outputs, tag)

    def _next_tag(self, equation) -> str | None:
        """Counts an equation; returns its tag if its name is wanted."""
        word = _word(equation)
        self.counts[word] += 1
        name = f"{words.INVENTED}{word}.{self.counts[word]}"
        return tags.of_invented(name) if self._wants(name) else None

    def _opened(self, jaxpr, equation, unnamed):
        """Returns a `custom_vjp` with tags in its forward rule.

        It is returned unchanged if nothing in the rule is wanted, or if it is an attention kernel,
        whose residuals have the policy `attention`.
        """
        rule, tree, inputs, run = forward_rule(jaxpr, equation)
        if tags.has_attention(rule):
            return equation
        pairs = list(zip(rule.jaxpr.outvars, equation.outvars, strict=False))
        outside, self._in_rule = self._in_rule, True
        made = self._jaxpr(rule.jaxpr, frozenset(v for v, _ in pairs if is_var(v)))
        self._in_rule = outside
        tag = self._next_tag(equation)
        if tag is not None:
            outputs = [v for v, outer in pairs if _is_array(v) and outer not in unnamed]
            made = tag_variables(made, outputs, tag)
        if made is rule.jaxpr:
            return equation
        call = with_rule(run, rule.replace(jaxpr=made), len(pairs), tree)
        return replaced(equation, inputs, call)


def _word(equation) -> str:
    """Returns the word of an equation: its primitive or function, in the plan grammar's letters."""
    name = equation.primitive.name
    if name in _CUSTOM:
        info = getattr(equation.params["call_jaxpr"].jaxpr, "debug_info", None)
        name = getattr(info, "func_name", None) or name
    word = _WORDS.get(name, name)
    return re.sub(r"[^A-Za-z0-9_]+", "", word.rpartition(".")[2]) or "value"


def _is(one, other) -> bool:
    return one is other


def _is_array(var) -> bool:
    """Whether a variable is read somewhere and holds numbers rather than keys or references."""
    dtype = getattr(var.aval, "dtype", None)
    is_number = dtype is not None and not jnp.issubdtype(dtype, jax.dtypes.extended)
    return type(var) is core.Var and is_number and dtype != jax.dtypes.float0


def _is_inexact(equation) -> bool:
    """Whether all inputs and outputs of an equation can have a derivative."""
    atoms = [*equation.invars, *equation.outvars]
    return all(jax.numpy.issubdtype(atom.aval.dtype, jax.numpy.inexact) for atom in atoms)


def is_var(atom) -> bool:
    """Returns whether an atom of a jaxpr is a variable rather than a literal."""
    return isinstance(atom, core.Var)


def tag_after(equation, variables: Sequence, tag: str) -> list:
    """Returns an equation, followed by the tags of some of its outputs.

    The old variables are the tags' outputs, so that readers read tagged values; the equation
    itself gets new output variables.
    """
    fresh = {var: copy.copy(var) for var in variables}
    made = equation.replace(outvars=[fresh.get(var, var) for var in equation.outvars])
    template, place = _tag_equation(tag), equation.source_info
    return [made] + [
        template.replace(invars=[inner], outvars=[outer], source_info=place)
        for outer, inner in fresh.items()
    ]


def tag_variables(jaxpr: core.Jaxpr, variables: Sequence, tag: str) -> core.Jaxpr:
    """Returns a jaxpr with a tag on those of some variables that its equations make."""
    made = []
    for equation in jaxpr.eqns:
        found = [var for var in dict.fromkeys(variables) if var in equation.outvars]
        made += tag_after(equation, found, tag) if found else [equation]
    return jaxpr if len(made) == len(jaxpr.eqns) else jaxpr.replace(eqns=made)


@functools.cache
def _tag_equation(tag: str):
    """Returns an equation that tags; its variables are to be replaced."""
    (made,) = jax.make_jaxpr(lambda x: checkpoint_name(x, tag))(0.0).eqns
    return made


def alone(jaxpr: core.Jaxpr, equation) -> tuple[Callable, list]:
    """Returns one equation as a function that returns a list, and the variables it reads."""
    inputs = list(dict.fromkeys(filter(is_var, equation.invars)))
    # JAX marks an unread output with a variable that cannot be returned.
    outputs = [var if type(var) is core.Var else core.Var(var.aval) for var in equation.outvars]
    made = equation.replace(outvars=outputs)
    only = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=[made])
    return core.jaxpr_as_fun(core.ClosedJaxpr(only, ())), inputs


def replaced(equation, inputs: Sequence, call: Callable):
    """Returns the one equation of `call(*inputs)`, with the outer variables of `equation`."""
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
    """Returns a `jax.checkpoint`, `jax.custom_jvp` or `jax.custom_vjp` equation as a plain call."""
    called = next(jaxprs.subjaxprs(equation))
    closed = called if isinstance(called, core.ClosedJaxpr) else core.ClosedJaxpr(called, ())
    avals = [var.aval for var in equation.invars]
    (made,) = jax.make_jaxpr(jax.jit(core.jaxpr_as_fun(closed)))(*avals).eqns
    return made.replace(invars=list(equation.invars), outvars=list(equation.outvars))


def tag_result(jaxpr: core.Jaxpr, equation, tag: str):
    """Returns an equation with one output whose derivative, too, reads the tagged output.

    The derivative of tanh is a function of its result. If it read the untagged result, keeping the
    tagged one would not spare the recomputation of tanh.
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
    """Returns the forward rule of a `custom_vjp` equation, in the form that `with_rule` takes.

    Returns:
      `(rule, tree, inputs, run)`: the rule's jaxpr, whose outputs are the function's outputs and
      the leaves of its reversal; the reversal's tree structure; the argument variables; the
      function.
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
      rule: The jaxpr of the forward rule, from `forward_rule`.
      count: How many outputs the function has.
      tree: The tree structure of the reversal, from `forward_rule`.
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
