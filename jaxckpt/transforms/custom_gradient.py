"""Functions with a gradient and a batching of their own: what the executors run blocks by.

    out = run_with_gradient(walk, carry, consts)     # a `Walk`: how blocks are run and reversed

`jax.custom_vjp` would do but for two things. Under `jax.vmap` it makes a gradient for every example
of what all examples share, and sums them afterwards; here the blocks themselves are batched. And
forward mode through it, or a second reverse mode, ends in an error of JAX that names neither
jaxckpt nor a plan that can; under `jit` it comes when nothing of ours is on the stack any more.

So there are three primitives. `_RUN` runs, `_TRANSPOSED` can be transposed but not run, `_ONCE` can
be run but not transposed. Forward mode over reverse mode (`jax.hessian`) passes them all.

`reverse_only` brings the sentence to a function that `jax.custom_vjp` is enough for: its tangents
go through `_REVERSED`, which can be transposed but not run, before they come to JAX's own error.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from jaxckpt.transforms import jaxprs
from jaxckpt.transforms.traced_block import abstract, zeros

_MESSAGE = (
    "a schedule has reverse mode, and forward mode over it (jax.hessian); {} is refused: "
    "remat='full' or nested=True has it"
)
_NO_FORWARD_MODE = _MESSAGE.format("forward mode by itself (jvp, linearize, jacfwd)")


class Walk(Protocol):
    """How blocks are run and reversed. Arguments are pytrees, outputs and gradients are lists."""

    @property
    def run(self) -> Callable[..., list]:
        """Returns the output for some arguments."""
        ...

    def forward(self, args: Sequence, asked: tuple[int, ...]) -> tuple[list, Any]:
        """Returns the output, and what `backward` is handed: any pytree.

        Args:
          args: The arguments.
          asked: The positions, among the leaves of all arguments, whose gradients are asked for.
        """
        ...

    def backward(self, residuals, grads: list) -> list:
        """Returns the gradients that are asked for.

        Args:
          residuals: What `forward` returned.
          grads: Of the output's inexact leaves; `ad.Zero` where the caller does not use one.
        """
        ...

    def out_dim(self, place: int) -> int:
        """Returns the axis that an output of `batched` has its batch in."""
        ...

    def batched(self, args: Sequence, dims: Sequence, axis) -> tuple["Walk", Sequence]:
        """Returns how a batch is run, and its arguments.

        Args:
          args: The arguments.
          dims: Of each leaf the batched axis, or None where all examples share it.
          axis: The batch, as JAX describes it: its size and its names.
        """
        ...


def run_with_gradient(walk: Walk, *args) -> list:
    """Returns `walk.run(*args)`, differentiable and batched as the walk says."""
    leaves, tree = jax.tree.flatten(args)
    flat = lambda *leaves: walk.run(*jax.tree.unflatten(tree, leaves))
    return _RUN.bind(*leaves, jaxpr=jax.make_jaxpr(flat)(*leaves), walk=walk, tree=tree)


def inexact(leaves: Sequence) -> list[int]:
    """Returns the positions of the leaves that have gradients: floating and complex ones."""
    return [place for place, leaf in enumerate(leaves) if _is_inexact(leaf)]


def pick(leaves: Sequence, positions: Sequence[int]) -> list:
    """Returns the leaves at `positions`."""
    return [leaves[position] for position in positions]


def batched_call(call: Callable, in_axes, axis) -> Callable:
    """Returns `jax.vmap` of a walk's call, with the names that the batch has outside."""
    names = {"axis_name": axis.name, "spmd_axis_name": axis.spmd_name}
    return jax.vmap(call, in_axes, 0, axis_size=axis.size, **names)


def moved(x, dim: int | None, to: int):
    """Returns an array with its batched axis in another place; as it is if it has none."""
    return x if dim is None else jnp.moveaxis(x, dim, to)


def widened(x, dim: int | None, axis):
    """Returns an array with the batch first, on the mesh axes of the batch; a copy an example."""
    if dim is None:
        return batching.broadcast(x, axis.size, 0, axis.explicit_mesh_axis)
    return moved(x, dim, 0)


def instantiated(grads: Sequence) -> list:
    """Returns the gradients, and arrays of zeros where the caller has no gradient."""
    zeros_of = lambda aval: zeros(1, aval)[0]
    return [zeros_of(g.aval) if isinstance(g, ad.Zero) else g for g in grads]


def _is_inexact(x) -> bool:
    return jnp.issubdtype(abstract(x).dtype, jnp.inexact)


_RUN = core.Primitive(jaxprs.SCHEDULE)
_RUN.multiple_results = True
_RUN.def_effectful_abstract_eval(lambda *_, jaxpr, **__: (jaxpr.out_avals, jaxpr.effects))


@_RUN.def_impl
def _evaluate(*leaves, jaxpr: core.ClosedJaxpr, **_):
    return core.jaxpr_as_fun(jaxpr)(*leaves)


def _differentiate(primals, tangents, *, jaxpr, walk: Walk, tree):
    asked = tuple(n for n, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero))
    out, residuals = walk.forward(jax.tree.unflatten(tree, primals), asked)
    leaves, residual_tree = jax.tree.flatten(residuals)
    made = _TRANSPOSED.bind(
        *leaves,
        *pick(tangents, asked),
        count=len(leaves),
        backward=lambda leaves, g: walk.backward(jax.tree.unflatten(residual_tree, leaves), g),
        avals=tuple(jax.typeof(out[place]) for place in inexact(out)),
    )
    tangents_out: list[Any] = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    for place, tangent in zip(inexact(out), made, strict=True):
        tangents_out[place] = tangent
    return out, tangents_out


def _batch_run(axis, leaves, dims, *, jaxpr, walk: Walk, tree):
    walk, args = walk.batched(jax.tree.unflatten(tree, leaves), dims, axis)
    out = run_with_gradient(walk, *args)
    return out, [walk.out_dim(place) for place in range(len(out))]


ad.primitive_jvps[_RUN] = _differentiate
mlir.register_lowering(_RUN, mlir.lower_fun(_evaluate, multiple_results=True))
batching.fancy_primitive_batchers[_RUN] = _batch_run


_TRANSPOSED = core.Primitive("jaxckpt_transposed")
_TRANSPOSED.multiple_results = True
_TRANSPOSED.def_abstract_eval(lambda *_, avals, **__: avals)


@_TRANSPOSED.def_impl
def _refuse_forward(*_, sentence: str = _NO_FORWARD_MODE, **__):
    raise NotImplementedError(sentence)


def _transpose(cotangents, *args, count: int, backward: Callable, avals):
    """Runs the backward pass. A leaf's gradient stands in the place of its tangent."""
    made = backward(list(args[:count]), _with_types(cotangents, avals))
    return [*(None for _ in range(count)), *map(_once, made)]


def _with_types(grads: Sequence, avals: Sequence) -> list:
    """Returns gradients, of which the zeros have these types."""
    pairs = zip(grads, avals, strict=True)
    return [ad.Zero(aval) if isinstance(g, ad.Zero) else g for g, aval in pairs]


def _batch_transposed(axis, args, dims, *, count: int, backward: Callable, avals):
    """Batches the backward pass; a tangent that all examples share gets the sum of gradients."""

    def batched(leaves, grads):
        one = lambda leaves, grads: backward(leaves, _with_types(grads, avals))
        run = batched_call(one, (list(dims[:count]), 0), axis)
        pairs = zip(run(leaves, grads), dims[count:], strict=True)
        return [g.sum(0) if dim is None else jnp.moveaxis(g, 0, dim) for g, dim in pairs]

    widen = lambda leaves: [widened(x, None, axis) for x in leaves]
    wide = jax.make_jaxpr(widen)(list(avals)).out_avals
    out = _TRANSPOSED.bind(*args, count=count, backward=batched, avals=tuple(wide))
    return out, [0] * len(out)


ad.primitive_transposes[_TRANSPOSED] = _transpose
ad.primitive_jvps[_TRANSPOSED] = _refuse_forward
mlir.register_lowering(_TRANSPOSED, _refuse_forward)
batching.fancy_primitive_batchers[_TRANSPOSED] = _batch_transposed


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


def reverse_only(x, sentence: str, *, at_once: bool = False):
    """Returns an array whose forward mode by itself `sentence` refuses.

    Args:
      x: An argument of a `jax.custom_vjp`.
      sentence: What the error says.
      at_once: Refuses any tangent of `x`: what is no argument, but computed in a forward pass, has
        one in forward mode over reverse mode alone.
    """
    return _REVERSE_ONLY.bind(x, sentence=sentence, at_once=at_once)


def _refuse_tangent(primals, tangents, *, sentence: str, at_once: bool):
    (tangent,) = tangents
    if isinstance(tangent, ad.Zero):
        return primals[0], tangent
    if at_once:
        raise NotImplementedError(sentence)
    return primals[0], _REVERSED.bind(tangent, sentence=sentence)


_REVERSE_ONLY = core.Primitive(jaxprs.REVERSE_ONLY)
_REVERSE_ONLY.def_abstract_eval(lambda x, **_: x)
_REVERSE_ONLY.def_impl(lambda x, **_: x)
ad.primitive_jvps[_REVERSE_ONLY] = _refuse_tangent
mlir.register_lowering(_REVERSE_ONLY, lambda _, x, **__: [x])
batching.primitive_batchers[_REVERSE_ONLY] = lambda args, dims, **static: (
    _REVERSE_ONLY.bind(*args, **static),
    dims[0],
)


# Reverse mode batches arguments and gradients, never a tangent that waits to be transposed.
_REVERSED = core.Primitive("jaxckpt_reversed")
_REVERSED.def_abstract_eval(lambda x, **_: x)
_REVERSED.def_impl(_refuse_forward)
ad.primitive_transposes[_REVERSED] = lambda cotangent, _, **__: [cotangent]
ad.primitive_jvps[_REVERSED] = _refuse_forward
mlir.register_lowering(_REVERSED, _refuse_forward)
batching.primitive_batchers[_REVERSED] = _refuse_forward
