"""Functions with a gradient of their own: reverse mode, of the leaves that are asked for.

    fn = with_gradient(run, forward, backward)

`jax.custom_vjp` would do but for what it says. Forward mode through it, or a second reverse mode,
ends in an error of JAX that names neither jaxckpt nor a plan that can; under `jit` it comes when
nothing of ours is on the stack any more. Two primitives raise our sentence wherever it happens:
`_TRANSPOSED` can be transposed but not run, `_ONCE` can be run but not transposed. Forward mode
over reverse mode (`jax.hessian`) passes both.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir

_MESSAGE = (
    "a schedule has reverse mode, and forward mode over it (jax.hessian); {} is refused: "
    "remat='full' or nested=True has it"
)


def with_gradient(run: Callable, forward: Callable, backward: Callable) -> Callable:
    """Returns `run` with a gradient of its own.

    Args:
      run: `run(*args) -> out`; an argument is any pytree of arrays, `out` a list of them.
      forward: `forward(args, asked) -> (out, residuals)`. `asked` has the positions, among the
        leaves of all arguments, whose gradients are asked for. Residuals are any pytree.
      backward: `backward(residuals, grads)` returns the gradients of the leaves that are asked
        for, from those of the floating and complex leaves of `out`; both are lists.
    """

    @jax.custom_jvp
    def fn(*args):
        return run(*args)

    def rule(primals, tangents):
        flat = jax.tree.leaves(tangents, is_leaf=_is_zero)
        asked = tuple(place for place, tangent in enumerate(flat) if not _is_zero(tangent))
        out, residuals = forward(primals, asked)
        leaves, tree = jax.tree.flatten(residuals)
        made = _TRANSPOSED.bind(
            *leaves,
            *pick(flat, asked),
            count=len(leaves),
            backward=lambda leaves, grads: backward(jax.tree.unflatten(tree, leaves), grads),
            avals=tuple(jax.typeof(out[place]) for place in inexact(out)),
        )
        tangents_out: list[Any] = [np.zeros(jnp.shape(x), jax.dtypes.float0) for x in out]
        for place, tangent in zip(inexact(out), made, strict=True):
            tangents_out[place] = tangent
        return out, tangents_out

    fn.defjvp(rule, symbolic_zeros=True)
    return fn


def inexact(leaves: Sequence) -> list[int]:
    """Returns the positions of the leaves that have gradients: floating and complex ones."""
    return [place for place, leaf in enumerate(leaves) if _is_inexact(leaf)]


def pick(leaves: Sequence, positions: Sequence[int]) -> list:
    """Returns the leaves at `positions`."""
    return [leaves[position] for position in positions]


def _is_inexact(x) -> bool:
    return jnp.issubdtype(jax.typeof(x).dtype, jnp.inexact)


def _is_zero(tangent) -> bool:
    """Whether JAX hands a rule no tangent of a leaf: nobody asks for its gradient."""
    symbolic: Any = jax.custom_derivatives.SymbolicZero
    return isinstance(tangent, symbolic) or getattr(tangent, "dtype", None) == jax.dtypes.float0


_TRANSPOSED = core.Primitive("jaxckpt_transposed")
_TRANSPOSED.multiple_results = True
_TRANSPOSED.def_abstract_eval(lambda *_, avals, **__: avals)


@_TRANSPOSED.def_impl
def _refuse_forward(*_, **__):
    raise NotImplementedError(_MESSAGE.format("forward mode by itself (jvp, linearize, jacfwd)"))


def _transpose(cotangents, *args, count: int, backward: Callable, avals):
    """Runs the backward pass. A leaf's gradient stands in the place of its tangent."""
    pairs = zip(cotangents, avals, strict=True)
    grads = [jnp.zeros(a.shape, a.dtype) if isinstance(c, ad.Zero) else c for c, a in pairs]
    return [*(None for _ in range(count)), *map(_once, backward(list(args[:count]), grads))]


def _batch(axis, args, dims, *, count: int, backward: Callable, avals):
    """Batches the backward pass; a tangent that all examples share gets the sum of gradients."""

    def batched(leaves, grads):
        run = jax.vmap(
            backward, (list(dims[:count]), 0), 0, axis_size=axis.size, axis_name=axis.name
        )
        pairs = zip(run(leaves, grads), dims[count:], strict=True)
        return [g.sum(0) if dim is None else jnp.moveaxis(g, 0, dim) for g, dim in pairs]

    widen = lambda x: jnp.broadcast_to(x, (axis.size, *x.shape))
    avals = jax.make_jaxpr(lambda leaves: [*map(widen, leaves)])(list(avals)).out_avals
    out = _TRANSPOSED.bind(*args, count=count, backward=batched, avals=tuple(avals))
    return out, [0] * len(out)


ad.primitive_transposes[_TRANSPOSED] = _transpose
ad.primitive_jvps[_TRANSPOSED] = _refuse_forward
mlir.register_lowering(_TRANSPOSED, _refuse_forward)
batching.fancy_primitive_batchers[_TRANSPOSED] = _batch


_ONCE = core.Primitive("jaxckpt_once")
_ONCE.def_abstract_eval(lambda x: x)
_ONCE.def_impl(lambda x: x)


def _refuse_reverse(*_):
    raise NotImplementedError(_MESSAGE.format("a second reverse mode (grad of grad)"))


ad.primitive_jvps[_ONCE] = lambda primals, tangents: (primals[0], _ONCE.bind(tangents[0]))
ad.primitive_transposes[_ONCE] = _refuse_reverse
mlir.register_lowering(_ONCE, lambda _, x: [x])
batching.primitive_batchers[_ONCE] = lambda args, dims: (_ONCE.bind(*args), dims[0])


@jax.custom_jvp
def _once(x):
    """Returns a gradient; a second reverse mode, which comes to it first, is refused."""
    return x


@_once.defjvp
def _(primals, tangents):
    return primals[0], _ONCE.bind(tangents[0])
