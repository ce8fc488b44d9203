"""Functions with a gradient and a batching rule of their own, which the executors run blocks by.

    out = run_with_gradient(walk, carry, consts)     # a `Walk`: how blocks are run and reversed

`jax.custom_vjp` has two faults here. Under `jax.vmap` it makes one gradient per example for a const
that all examples share, and sums them afterwards; here the blocks themselves are batched. And
forward mode, or a second reverse mode, ends in an error of JAX that names neither jaxckpt nor a
plan that works; under `jit` it is raised after jaxckpt has returned, so we could not reword it.

So there are three primitives. `_RUN` runs, `_TRANSPOSED` can be transposed but not run, `_ONCE` can
be run but not transposed. Forward mode over reverse mode (`jax.hessian`) passes all three.

`reverse_only` gives a `jax.custom_vjp` our error text for forward mode: its tangents pass through
`_REVERSED`, which can be transposed but not run, before they reach JAX's own error.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from jaxckpt.transforms import jaxprs
from jaxckpt.transforms.traced_block import abstract, zeros

# The error's text for a derivative that a walk does not have; `{}` is the derivative's name.
OF_SCHEDULES = (
    "a schedule has reverse mode, and forward mode over it (jax.hessian); {} is refused: "
    "remat='full' or nested=True has it"
)
_SECOND_REVERSE = "a second reverse mode (grad of grad)"


class Walk(Protocol):
    """How blocks are run and reversed. Arguments are pytrees, outputs and gradients are lists."""

    @property
    def run(self) -> Callable[..., list]:
        """Returns the output for some arguments."""
        ...

    def forward(self, args: Sequence, asked: tuple[int, ...]) -> tuple[list, Any]:
        """Returns the output, and the residuals for `backward`, any pytree.

        Args:
          args: The arguments.
          asked: The positions, among the leaves of all arguments, whose gradients are asked for.
        """
        ...

    def backward(self, residuals, grads: list) -> list:
        """Returns the gradients that are asked for.

        Args:
          residuals: The second value that `forward` returned.
          grads: Gradients of the output's inexact leaves; `ad.Zero` for an unused leaf.
        """
        ...

    def out_dim(self, place: int) -> int:
        """Returns the batch axis of the output at `place` of `batched`."""
        ...

    def batched(self, args: Sequence, dims: Sequence, axis) -> tuple["Walk", Sequence]:
        """Returns the walk that runs a batch, and the arguments for it.

        Args:
          args: The arguments.
          dims: The batch axis of each leaf, in the structure of the arguments; None for a leaf that
            all examples share.
          axis: The batch, as JAX describes it: its size and its names.
        """
        ...


def run_with_gradient(walk: Walk, *args, refusal: str = OF_SCHEDULES) -> list:
    """Returns `walk.run(*args)`, differentiable and batched as the walk says.

    Args:
      walk: How the blocks are run and reversed.
      *args: The arguments of the walk.
      refusal: The error's text for a derivative that the walk does not have; `{}` is its name.
    """
    leaves, tree = jax.tree.flatten(args)
    flat = lambda *leaves: walk.run(*jax.tree.unflatten(tree, leaves))
    static = {"walk": walk, "tree": tree, "refusal": refusal}
    return _RUN.bind(*leaves, jaxpr=jax.make_jaxpr(flat)(*leaves), **static)


def inexact(leaves: Sequence) -> list[int]:
    """Returns the positions of the leaves that have gradients: floating and complex ones."""
    return [place for place, leaf in enumerate(leaves) if _is_inexact(leaf)]


def pick(leaves: Sequence, positions: Sequence[int]) -> list:
    """Returns the leaves at `positions`."""
    return [leaves[position] for position in positions]


def batched_call(call: Callable, in_axes, axis) -> Callable:
    """Returns `jax.vmap` of a walk's call, under the axis names of the outer `jax.vmap`."""
    names = {"axis_name": axis.name, "spmd_axis_name": axis.spmd_name}
    return jax.vmap(call, in_axes, 0, axis_size=axis.size, **names)


def moved(x, dim: int | None, to: int):
    """Returns an array with its batch axis moved to `to`; unchanged if it has no batch axis."""
    return x if dim is None else jnp.moveaxis(x, dim, to)


def widened(x, dim: int | None, axis):
    """Returns an array with the batch axis first, on the batch's mesh axes; copied if unbatched."""
    if dim is None:
        return batching.broadcast(x, axis.size, 0, axis.explicit_mesh_axis)
    return moved(x, dim, 0)


def instantiated(grads: Sequence) -> list:
    """Returns the gradients with arrays of zeros in place of `ad.Zero`."""
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


def _differentiate(primals, tangents, *, jaxpr, walk: Walk, tree, refusal: str):
    asked = tuple(n for n, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero))
    out, residuals = walk.forward(jax.tree.unflatten(tree, primals), asked)
    leaves, residual_tree = jax.tree.flatten(residuals)
    made = _TRANSPOSED.bind(
        *leaves,
        *pick(tangents, asked),
        count=len(leaves),
        backward=lambda leaves, g: walk.backward(jax.tree.unflatten(residual_tree, leaves), g),
        avals=tuple(jax.typeof(out[place]) for place in inexact(out)),
        sentence=refusal,
    )
    tangents_out: list[Any] = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    for place, tangent in zip(inexact(out), made, strict=True):
        tangents_out[place] = tangent
    return out, tangents_out


def _batch_run(axis, leaves, dims, *, jaxpr, walk: Walk, tree, refusal: str):
    walk, args = walk.batched(tree.unflatten(leaves), tree.unflatten(dims), axis)
    out = run_with_gradient(walk, *args, refusal=refusal)
    return out, [walk.out_dim(place) for place in range(len(out))]


ad.primitive_jvps[_RUN] = _differentiate
mlir.register_lowering(_RUN, mlir.lower_fun(_evaluate, multiple_results=True))
batching.fancy_primitive_batchers[_RUN] = _batch_run


_TRANSPOSED = core.Primitive("jaxckpt_transposed")
_TRANSPOSED.multiple_results = True
_TRANSPOSED.def_abstract_eval(lambda *_, avals, **__: avals)


@_TRANSPOSED.def_impl
def _refuse_forward(*_, sentence: str, **__):
    raise NotImplementedError(sentence.format("forward mode by itself (jvp, linearize, jacfwd)"))


def _transpose(cotangents, *args, count: int, backward: Callable, avals, sentence: str):
    """Runs the backward pass; returns each leaf's gradient in the place of its tangent."""
    made = backward(list(args[:count]), _with_types(cotangents, avals))
    once = _once(sentence.format(_SECOND_REVERSE))
    return [*(None for _ in range(count)), *map(once, made)]


def _with_types(grads: Sequence, avals: Sequence) -> list:
    """Returns the gradients; every `ad.Zero` gets its type in `avals`."""
    pairs = zip(grads, avals, strict=True)
    return [ad.Zero(aval) if isinstance(g, ad.Zero) else g for g, aval in pairs]


def _batch_transposed(axis, args, dims, *, count: int, backward: Callable, avals, sentence: str):
    """Batches the backward pass; a tangent that all examples share gets the gradients' sum."""

    def batched(leaves, grads):
        one = lambda leaves, grads: backward(leaves, _with_types(grads, avals))
        run = batched_call(one, (list(dims[:count]), 0), axis)
        pairs = zip(run(leaves, grads), dims[count:], strict=True)
        return [g.sum(0) if dim is None else jnp.moveaxis(g, 0, dim) for g, dim in pairs]

    widen = lambda leaves: [widened(x, None, axis) for x in leaves]
    wide = jax.make_jaxpr(widen)(list(avals)).out_avals
    static = {"count": count, "backward": batched, "avals": tuple(wide), "sentence": sentence}
    out = _TRANSPOSED.bind(*args, **static)
    return out, [0] * len(out)


ad.primitive_transposes[_TRANSPOSED] = _transpose
ad.primitive_jvps[_TRANSPOSED] = _refuse_forward
mlir.register_lowering(_TRANSPOSED, _refuse_forward)
batching.fancy_primitive_batchers[_TRANSPOSED] = _batch_transposed


def _returning(name: str, jvp: Callable) -> core.Primitive:
    """Returns a primitive that returns its argument, with a JVP rule of its own."""
    made = core.Primitive(name)
    made.def_abstract_eval(lambda x, **_: x)
    made.def_impl(lambda x, **_: x)
    ad.primitive_jvps[made] = jvp
    mlir.register_lowering(made, lambda _, x, **__: [x])
    batching.primitive_batchers[made] = lambda args, dims, **static: (
        made.bind(*args, **static),
        dims[0],
    )
    return made


def _linear(name: str, transpose: Callable) -> core.Primitive:
    """Returns a primitive that returns its argument, with a transpose of its own."""
    both = lambda *args, **static: tuple(made.bind(*x, **static) for x in args)
    made = _returning(name, both)
    ad.primitive_transposes[made] = transpose
    return made


def _refuse_reverse(*_, sentence: str):
    raise NotImplementedError(sentence)


def _identity(primitive: core.Primitive, sentence: str) -> Callable:
    """Returns the identity function whose tangents pass a primitive."""
    same = jax.custom_jvp(lambda x: x)
    pass_on = lambda primals, tangents: (primals[0], primitive.bind(tangents[0], sentence=sentence))
    same.defjvp(pass_on)
    return same


_ONCE = _linear("jaxckpt_once", _refuse_reverse)


@functools.cache
def _once(sentence: str) -> Callable:
    """Returns the identity for a gradient: a second reverse mode meets it first, and is refused."""
    return _identity(_ONCE, sentence)


_PASSED = _linear("jaxckpt_passed", lambda grad, _, sentence: [_once(sentence)(grad)])


def reversed_once(tree, sentence: str):
    """Returns a tree unchanged; a second reverse mode through it raises a sentence as an error."""
    same = _identity(_PASSED, sentence)
    return jax.tree.map(lambda x: same(x) if _is_inexact(x) else x, tree)


def reverse_only(x, sentence: str, *, at_once: bool = False):
    """Returns `x` unchanged; pure forward mode through it raises an error that says `sentence`.

    Args:
      x: An argument of a `jax.custom_vjp`.
      sentence: The error's text.
      at_once: Refuses any tangent of `x`. A value computed in the forward pass, unlike an argument,
        has a tangent only in forward mode over reverse mode.
    """
    return _REVERSE_ONLY.bind(x, sentence=sentence, at_once=at_once)


def _refuse_tangent(primals, tangents, *, sentence: str, at_once: bool):
    (tangent,) = tangents
    if isinstance(tangent, ad.Zero):
        return primals[0], tangent
    if at_once:
        raise NotImplementedError(sentence)
    return primals[0], _REVERSED.bind(tangent, sentence=sentence)


_REVERSE_ONLY = _returning(jaxprs.REVERSE_ONLY, _refuse_tangent)

# Batching `_REVERSED` is refused: reverse mode batches arguments and gradients, but never a
# tangent that waits to be transposed.
_REVERSED = core.Primitive("jaxckpt_reversed")
_REVERSED.def_abstract_eval(lambda x, **_: x)
_REVERSED.def_impl(_refuse_forward)
ad.primitive_transposes[_REVERSED] = lambda cotangent, _, **__: [cotangent]
ad.primitive_jvps[_REVERSED] = _refuse_forward
mlir.register_lowering(_REVERSED, _refuse_forward)
batching.primitive_batchers[_REVERSED] = _refuse_forward
