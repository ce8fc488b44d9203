"""Reading jaxprs: the names of JAX's primitives, every equation of a function, trips of loops.

The table lists each primitive under all names that it has had. JAX promises none of them, so no
other file spells one, and `tests/test_canary.py` checks the names on every JAX of the gate.

The executor's loops read their bounds from a table, so a jaxpr shows a `while` without a count. The
executor knows the totals and writes them into the name stack, where a FLOP counter finds them
(`trips`).
"""

import fractions
import re
from collections.abc import Callable, Iterator

import jax
from jax.extend import core

# Calls of one function.
JITS = ("jit", "pjit", "closed_call", "core_call")
REMATS = ("remat", "remat2", "checkpoint")
CUSTOM_JVPS = ("custom_jvp_call",)
CUSTOM_VJPS = ("custom_vjp_call", "custom_vjp_call_jaxpr")
CUSTOM_VMAPS = ("custom_vmap_call",)
SCHEDULE = "jaxckpt_run"  # jaxckpt's own: blocks that an executor runs
CALLS = frozenset((*JITS, *REMATS, *CUSTOM_JVPS, *CUSTOM_VJPS, *CUSTOM_VMAPS, SCHEDULE))

# Loops, branches, maps over devices, kernels.
SCAN, WHILE, COND, SHARD_MAP, PALLAS = "scan", "while", "cond", "shard_map", "pallas_call"
DOT, RAGGED_DOT, CONV = "dot_general", "ragged_dot_general", "conv_general_dilated"
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"
CUDNN_BACKWARD = "dot_product_attention_bwd_wrapper"
CUDNN_FP8_FORWARD = "dot_product_attention_fp8_fwd_wrapper"
CUDNN_FP8_BACKWARD = "dot_product_attention_fp8_bwd_wrapper"
CUDNN = (CUDNN_FORWARD, CUDNN_BACKWARD, CUDNN_FP8_FORWARD, CUDNN_FP8_BACKWARD)

# Primitives that return their input: a tag, a copy, a move to another memory, a rounding, a cast.
TAG, PUT, ROUND, CAST = "name", "device_put", "reduce_precision", "convert_element_type"
REVERSE_ONLY = "jaxckpt_reverse_only"  # jaxckpt's own
COPIES = ("copy", "copy_p", REVERSE_ONLY)
BARRIER = "optimization_barrier"
CHECK = "check"  # of checkify
PLACEMENTS = ("pvary", "pcast", "sharding_constraint")
BROADCAST, BITCAST = "broadcast_in_dim", "bitcast_convert_type"
SHAPES = ("reshape", "squeeze", "expand_dims", "transpose")

# Parts of arrays, and arrays of parts.
SLICES = frozenset(("slice", "dynamic_slice", "gather", "split"))
JOINS = frozenset(("concatenate", "stack", "pad"))
UPDATE = "dynamic_update_slice"
SCATTERS = "scatter"  # a prefix of names
REDUCTIONS = ("reduce", "arg")  # prefixes of names; `ROUND` begins so too, but reduces nothing
CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
SORTS = ("sort", "top_k", "fft")

RANDOM_BITS = ("random_bits", "threefry2x32")
ALL_REDUCES = ("psum", "psum2", "psum_invariant", "pmax", "pmin")
GATHERS = ("all_gather", "all_gather_invariant", "reduce_scatter", "psum_scatter")
EXCHANGES = ("all_to_all", "ragged_all_to_all", "ppermute", "pbroadcast")

# Primitives whose derivative is a function of their result.
RULES_READ_RESULT = frozenset(
    (
        *("tanh", "logistic", "exp", "exp2", "expm1", "sqrt", "rsqrt", "cbrt", "tan", "erf_inv"),
        *("max", "min", "pow", "reduce_max", "reduce_min"),
    )
)
SELECT, INTEGER_POWER = "select_n", "integer_pow"


def linearized(fn: Callable, *args) -> core.ClosedJaxpr:
    """Returns the jaxpr of `fn`'s forward pass as reverse-mode differentiation runs it.

    The plain jaxpr of a `jax.custom_vjp` hides its forward rule, and with it tags and kernels;
    under `jax.vjp` the rule itself is traced. Nothing is computed.

    Args:
      fn: A function of pytrees of arrays.
      *args: Its arguments, arrays or `jax.ShapeDtypeStruct`s.
    """
    return jax.make_jaxpr(lambda *args: jax.vjp(fn, *args))(*args)


def equations(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Yields every equation, each followed by the equations of the jaxprs in its parameters."""
    if isinstance(jaxpr, core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    for equation in jaxpr.eqns:
        yield equation
        for inner in subjaxprs(equation):
            yield from equations(inner)


def subjaxprs(equation: core.JaxprEqn) -> Iterator[core.ClosedJaxpr | core.Jaxpr]:
    """Yields the jaxprs in an equation's parameters: a loop's or call's body, a cond's branches."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr | core.Jaxpr):
                yield item


def places_arrays(equation: core.JaxprEqn) -> bool:
    """Returns whether a `jit` gives its arguments or results shardings of their own."""
    kinds = ("in_shardings", "out_shardings")
    found = [one for kind in kinds for one in equation.params.get(kind) or ()]
    return any("Unspecified" not in type(one).__name__ for one in found)


_PREFIX = "jaxckpt_trips_"
_PATTERN = re.compile(_PREFIX + r"([0-9]+)_of_([0-9]+)")
_OF_LOOP = re.compile(_PATTERN.pattern + "/while$")


def trips(total: int, runs: int):
    """Returns a context for making one loop, which makes `total` trips in `runs` runs."""
    return jax.named_scope(f"{_PREFIX}{total}_of_{max(runs, 1)}")


def mean_trips(equation: core.JaxprEqn) -> fractions.Fraction:
    """Returns the mean trips of one run of a `while`; 1 if the loop was made outside `trips`."""
    found = _PATTERN.findall(str(equation.source_info.name_stack))
    return fractions.Fraction(*map(int, found[-1])) if found else fractions.Fraction(1)


def is_unknown(equation: core.JaxprEqn) -> bool:
    """Returns whether an equation is a `while` whose trips nobody knows."""
    if equation.primitive.name != WHILE:
        return False
    return _PATTERN.search(str(equation.source_info.name_stack)) is None


def says_trips(op_name: str) -> bool:
    """Returns whether a compiled loop was made inside `trips`, by its operation's name."""
    return any(_PREFIX in part for part in op_name.split("/")[-2:])


def trips_of_name(op_name: str) -> fractions.Fraction | None:
    """Returns the mean trips of a compiled loop by its operation's name; None if it has none."""
    found = _OF_LOOP.search(op_name)
    return fractions.Fraction(*map(int, found.groups())) if found else None
