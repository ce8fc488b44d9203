"""Invented names: a plan speaks of values that nobody tagged, as `names:@dot.2,@tanh.1`.

`@dot.2` is what the block's second matrix product returns: each step of the block's jaxpr is named
by its primitive and counted in order, through `jit`, `scan`, `cond`, `shard_map`, `jax.checkpoint`
and the forward rule of a `jax.custom_vjp`. The same block has the same names in every process.
`named` puts tags at these places into the block's jaxpr; from there on policies treat them as a
user's tags. No tag of a user can be one of these, since tags have no `@`.

Values without a name: views (a reshape, a transpose), random keys, what the user has tagged, what
an attention kernel keeps (the policy `attention` means all of it), and what only the derivative
rule of a primitive or of a `jax.custom_jvp` makes. Names follow the jaxpr: another release of JAX
may count otherwise.
"""

import copy
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from jaxckpt.plans import Policy, words
from jaxckpt.transforms import jaxprs, tags

_TRANSPARENT = frozenset(
    ("jit", "pjit", "closed_call", "core_call", "scan", "cond", "shard_map", *jaxprs.REMATS)
)
_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
# The same array seen otherwise: to make it again costs nothing, so it needs no name.
_VIEWS = frozenset(
    (
        *("name", "copy", "copy_p", "device_put", "reduce_precision", "optimization_barrier"),
        *("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "pvary"),
        *("bitcast_convert_type", "sharding_constraint"),
    )
)
_WORDS = {
    "dot_general": "dot",
    "conv_general_dilated": "conv",
    "convert_element_type": "cast",
    "select_n": "where",
    "integer_pow": "pow",
}


def named(block: Callable, wants: Callable[[str], bool], *, opens_remat: bool = False) -> Callable:
    """Returns a block that does the same, with a tag on the values whose invented names are wanted.

    Args:
      block: A function of pytrees of arrays.
      wants: Told a name such as `"@dot.2"`, returns whether its values get a tag.
      opens_remat: Takes out any `jax.checkpoint` inside the block, for who wants to know what the
        block would keep without it.
    """

    def call(*args):
        leaves, tree = jax.tree.flatten(args)
        flat = lambda *leaves: block(*jax.tree.unflatten(tree, leaves))
        closed, out = jax.make_jaxpr(flat, return_shape=True)(*leaves)
        edited = _Namer(wants, opens_remat).closed(closed)
        return jax.tree.unflatten(jax.tree.structure(out), core.jaxpr_as_fun(edited)(*leaves))

    return call


def resolved(block: Callable, policies: Iterable[Policy]) -> Callable:
    """Returns a block in which the values that some policies name as `@...` have their tags."""
    patterns = [name for policy in policies for name in policy.names if words.is_invented(name)]
    if not patterns:
        return block
    return named(block, lambda name: any(words.matches(name, pattern) for pattern in patterns))


def offered(block: Callable, policies: Iterable[Policy], *args) -> tags.Tags:
    """Returns the tags of a block; invented names are among them if a policy speaks of any.

    Args:
      block: As it is, without tags for invented names.
      policies: Those that are to be checked.
      *args: The block's arguments, arrays or abstract.
    """
    if any(words.is_invented(name) for policy in policies for name in policy.names):
        block = named(block, lambda name: True)
    return tags.tags_of(block, *args)


class _Namer:
    """Edits jaxprs, counting as it goes."""

    def __init__(self, wants: Callable[[str], bool], opens_remat: bool):
        self._wants = wants
        self._opens_remat = opens_remat
        self._counts = Counter()
        self._in_rule = False

    def closed(self, closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
        """Returns a closed jaxpr with tags; itself if nothing in it is wanted."""
        edited = self._jaxpr(closed.jaxpr)
        return closed if edited is closed.jaxpr else closed.replace(jaxpr=edited)

    def _jaxpr(self, jaxpr: core.Jaxpr, unnamed=frozenset()) -> core.Jaxpr:
        """Returns an open jaxpr with tags, but for the variables of `unnamed`."""
        tagged = {e.invars[0] for e in jaxpr.eqns if e.primitive.name == "name"}
        made = [self._equation(jaxpr, e, tagged | unnamed) for e in jaxpr.eqns]
        flat = [equation for group in made for equation in group]
        if len(flat) == len(jaxpr.eqns) and all(map(_is, flat, jaxpr.eqns)):
            return jaxpr
        return jaxpr.replace(eqns=flat)

    def _equation(self, jaxpr, equation, unnamed) -> list:
        """Returns what stands for one equation of a jaxpr."""
        name, word = equation.primitive.name, _word(equation)
        if (name in jaxprs.REMATS and self._opens_remat) or (name in _CUSTOM and self._in_rule):
            # What a derivative rule runs is not differentiated once more.
            plain = _as_jit(equation)
            opened = self._inside(plain)
            return [equation if opened is plain and name in _CUSTOM else opened]
        if name in _TRANSPARENT:
            return [self._inside(equation)]
        if name.startswith("custom_vjp"):
            opened = self._opened(jaxpr, equation)
            if opened is None:  # an attention kernel, whose arrays have a policy of their own
                return [equation]
            equation = opened
        return self._tagged(equation, word, unnamed)

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

    def _tagged(self, equation, word: str, unnamed) -> list:
        """Returns an equation, and after it the tags of its outputs if its name is wanted."""
        outputs = [var for var in equation.outvars if _is_array(var) and var not in unnamed]
        if equation.primitive.name in _VIEWS or not any(map(_is_var, equation.invars)):
            return [equation]
        self._counts[word] += 1
        name = f"{words.INVENTED}{word}.{self._counts[word]}"
        if not outputs or not self._wants(name):
            return [equation]
        fresh = {var: copy.copy(var) for var in outputs}
        made = equation.replace(outvars=[fresh.get(var, var) for var in equation.outvars])
        template = _name_equation(tags.of_invented(name))
        place = {"source_info": equation.source_info}
        return [made] + [
            template.replace(invars=[inner], outvars=[outer], **place)
            for outer, inner in fresh.items()
        ]

    def _opened(self, jaxpr, equation):
        """Returns a `custom_vjp` whose forward rule has tags; None for an attention kernel.

        It is itself where nothing in the rule is wanted.
        """
        run, inputs = _alone(jaxpr, equation)
        trees = []

        def forward(*args):
            out, reverse = jax.vjp(run, *args)
            leaves, tree = jax.tree.flatten(reverse)
            trees.append(tree)
            return [*out, *leaves]

        rule = jax.make_jaxpr(forward)(*(var.aval for var in inputs))
        if tags.has_attention(rule):
            return None
        count = len(equation.outvars)
        outputs = frozenset(v for v in rule.jaxpr.outvars[:count] if isinstance(v, core.Var))
        outside, self._in_rule = self._in_rule, True
        edited = self._jaxpr(rule.jaxpr, outputs)
        self._in_rule = outside
        if edited is rule.jaxpr:
            return equation
        rule = core.jaxpr_as_fun(rule.replace(jaxpr=edited))
        return _replaced(equation, inputs, _with_rule(run, rule, count, trees[-1]))


def _with_rule(run: Callable, rule: Callable, count: int, tree) -> Callable:
    """Returns `run` under a `custom_vjp` with the given forward rule.

    Args:
      run: The function.
      rule: Returns the function's `count` outputs and the leaves of its reversal.
      count: How many outputs.
      tree: The reversal's structure.
    """

    @jax.custom_vjp
    def call(*args):
        return run(*args)

    def forward(*args):
        made = rule(*args)
        return made[:count], jax.tree.unflatten(tree, made[count:])

    call.defvjp(forward, lambda reverse, grads: reverse(list(grads)))
    return call


def _alone(jaxpr: core.Jaxpr, equation):
    """Returns one equation as a function, and its variables, the function's arguments."""
    inputs = list(dict.fromkeys(filter(_is_var, equation.invars)))
    alone = jaxpr.replace(
        constvars=[], invars=inputs, outvars=list(equation.outvars), eqns=[equation]
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ())), inputs


def _replaced(equation, inputs, call: Callable):
    """Returns `call(*inputs)`, a single equation, in the place of another."""
    traced = jax.make_jaxpr(lambda *args: call(*args))(*(var.aval for var in inputs)).jaxpr
    (made,) = traced.eqns
    outer = dict(zip(traced.invars, inputs, strict=True))
    places = dict(zip(traced.outvars, equation.outvars, strict=True))
    return made.replace(
        invars=[outer[v] if _is_var(v) else v for v in made.invars],
        outvars=[places.get(v, v) for v in made.outvars],
        source_info=equation.source_info,
    )


def _as_jit(equation):
    """Returns a `jax.checkpoint` or a custom derivative's function as a plain call."""
    called = next(jaxprs.subjaxprs(equation))
    closed = called if isinstance(called, core.ClosedJaxpr) else core.ClosedJaxpr(called, ())
    run = core.jaxpr_as_fun(closed)
    avals = [var.aval for var in equation.invars]
    (made,) = jax.make_jaxpr(jax.jit(run))(*avals).eqns
    return made.replace(invars=list(equation.invars), outvars=list(equation.outvars))


@functools.cache
def _name_equation(name: str):
    """Returns the equation of a tag, to be given other variables."""
    (made,) = jax.make_jaxpr(lambda x: checkpoint_name(x, name))(0.0).eqns
    return made


def _word(equation) -> str:
    """Returns the word of an equation: what makes its value, in the plan grammar's letters."""
    name = equation.primitive.name
    if name in _CUSTOM:
        info = getattr(equation.params["call_jaxpr"].jaxpr, "debug_info", None)
        name = getattr(info, "func_name", None) or name
    word = _WORDS.get(name, name)
    return re.sub(r"[^A-Za-z0-9_]+", "", word.rpartition(".")[2]) or "value"


def _is(one, other) -> bool:
    return one is other


def _is_var(atom) -> bool:
    return isinstance(atom, core.Var)


def _is_array(var) -> bool:
    """Whether a variable is read by someone and holds numbers rather than keys or references."""
    dtype = getattr(var.aval, "dtype", None)
    is_number = dtype is not None and not jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
    return type(var) is core.Var and is_number and dtype != jax.dtypes.float0
