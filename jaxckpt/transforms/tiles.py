"""`tiled`: a position-wise function tile by tile, so that only one tile's values are in memory.

    y = jaxckpt.tiled(mlp, num_tiles=8)(x, params)

An MLP's hidden values are several times as wide as its input. For long sequences they set the peak
of a checkpointed block. The forward pass runs tile by tile. The backward pass runs a tile forward
and reverses it at once. Under a checkpointed block the function therefore runs twice in all: JAX
leaves the function out of the block's own recomputation, because nothing there reads its output.

Limits: policies outside the function do not see tags inside it. The only derivatives are reverse
mode, and forward mode over reverse mode.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray

from jaxckpt.plans.errors import check_count, shown
from jaxckpt.transforms.block_vjp import Moving, differentiate
from jaxckpt.transforms.custom_gradient import (
    batched_call,
    inexact,
    instantiated,
    moved,
    pick,
    run_with_gradient,
    widened,
)
from jaxckpt.transforms.traced_block import TracedBlock, abstract, as_arrays, trace_block, zeros

_REFUSAL = (
    "tiled has reverse mode, and forward mode over it (jax.hessian); {} is refused: one tile has it"
)

_CHECKED = 4  # positions that `check` computes on


def tiled(fn: Callable, num_tiles: int, axis: int = 1, *, check: bool = False) -> Callable:
    """Returns a position-wise function that runs tile by tile along an axis.

    Values and gradients stay the same up to rounding. Gradients of arrays that all tiles share,
    such as weights, are summed in float32.

    Args:
      fn: `fn(x, *args) -> y`, pure. A position of `y` depends only on the same position of `x`, as
        in an MLP, a norm, a projection or a head. Arrays that `fn` closes over get gradients too.
      num_tiles: The number of tiles along the axis. All tiles have one size, rounded up; the last
        tile may be shorter.
      axis: The axis of positions, in every leaf of `x` and of `y`.
      check: Also compares values: once per trace, `fn` runs on a few positions of random numbers,
        whole and in two halves. A function that mixes positions is found this way.

    Returns:
      `tiled_fn(x, *args) -> y`. Each tile gets its positions of `x`, and all of `*args`.

    Raises:
      ValueError: `num_tiles` is no positive whole number. When the returned function is called:
        `x` has no such axis, or `fn` is not position-wise.
      NotImplementedError: Forward mode by itself, or a second reverse mode.

    Example:
      >>> import jax, jax.numpy as jnp, jaxckpt
      >>> mlp = lambda x, w: jnp.tanh(x @ w["up"]) @ w["down"]
      >>> w = {"up": jnp.ones([4, 16]), "down": jnp.ones([16, 4])}
      >>> loss = lambda w, x: jaxckpt.tiled(mlp, num_tiles=3)(x, w).sum()
      >>> jax.grad(loss)(w, jnp.ones([2, 10, 4]))["up"].shape
      (4, 16)
    """
    if not callable(fn):
        raise ValueError(f"tiled takes a function, not {shown(fn)}")
    check_count("num_tiles", num_tiles)

    @functools.wraps(fn)
    def call(x, *args):
        x, args = as_arrays((x, args))
        length = _length(x, axis)
        size = -(-length // num_tiles)
        if size >= length:
            return fn(x, *args)
        trace = functools.partial(_traced, fn, x, args, axis)
        whole, _ = trace(length)
        traced = [trace(n) for n in (size, length % size) if n]
        for part, _ in traced:
            _check_shapes(whole, part, axis, length)
        if check:
            _check_values(trace, axis, min(length, _CHECKED))
        walk = _Tiles(
            calls=tuple(_with_part(part, n, traced) for n, (part, _) in enumerate(traced)),
            length=length,
            size=size,
            axis=axis,
            out=tuple(whole.jaxpr.out_avals),
        )
        consts = [const for _, part in traced for const in part]
        leaves = (jax.tree.leaves(args), jax.tree.leaves(x), consts)
        out = run_with_gradient(walk, *leaves, refusal=_REFUSAL)
        return jax.tree.unflatten(whole.out_tree, out)

    return call


def _length(x, axis: int) -> int:
    """Returns the number of positions, which all leaves share."""
    sizes = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if not -leaf.ndim <= axis < leaf.ndim:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"tiled: x{name} is {leaf.shape}, which has no axis {axis}")
        sizes.add(leaf.shape[axis])
    if len(sizes) != 1:
        raise ValueError(
            f"tiled: the leaves of x have {sorted(sizes) or 'no'} positions on axis {axis}; they "
            "have one number of them"
        )
    return sizes.pop()


def _cut(x, start, size: int, axis: int):
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _traced(fn: Callable, x, args, axis: int, size: int) -> tuple[TracedBlock, list]:
    """Returns `fn` traced for `size` positions, and what it closes over."""
    leaves, tree = jax.tree.flatten(x)
    cut = jax.make_jaxpr(lambda leaves: [_cut(leaf, 0, size, axis) for leaf in leaves])
    part = jax.tree.unflatten(tree, cut(abstract(leaves)).out_avals)
    return trace_block(lambda x, args: fn(x, *args), part, abstract(args))


def _with_part(traced: TracedBlock, number: int, others: Sequence) -> Callable:
    """Returns a traced part's call, which picks its own consts from the consts of all parts."""
    start = sum(len(consts) for _, consts in others[:number])
    stop = start + len(others[number][1])
    return lambda x, args, consts: traced.call(x, args, consts[start:stop])


def _check_shapes(whole: TracedBlock, part: TracedBlock, axis: int, length: int):
    """Raises `ValueError` unless a part's output is the whole output with fewer positions."""
    size = part.jaxpr.in_avals[0].shape[axis]
    for all_of_it, one in zip(whole.jaxpr.out_avals, part.jaxpr.out_avals, strict=False):
        wanted = list(one.shape)
        if -one.ndim <= axis < one.ndim:
            wanted[axis] = length if wanted[axis] == size else -1
        if whole.out_tree != part.out_tree or tuple(wanted) != all_of_it.shape or axis >= one.ndim:
            raise ValueError(
                f"tiled: fn is not position-wise along axis {axis}: {length} positions give "
                f"{all_of_it.shape}, and {size} give {one.shape}; each position of x gives one of y"
            )


def _check_values(trace: Callable, axis: int, count: int):
    """Raises `ValueError` if a position's values depend on whether other positions are there."""
    half = count // 2
    (whole, consts), (first, _), (last, _) = map(trace, (count, half, count - half))
    generator = np.random.default_rng(0)
    with jax.ensure_compile_time_eval():
        x, args, _ = [[_random(x, generator) for x in group] for group in whole.inputs]
        consts = [_random(abstract(x), generator) for x in consts]
        expected = whole.call(x, args, consts)
        parts = [
            part.call([_cut(leaf, start, size, axis) for leaf in x], args, consts)
            for part, start, size in ((first, 0, half), (last, half, count - half))
        ]
        for one, *pair in zip(expected, *parts, strict=True):
            found = jnp.concatenate(pair, axis)
            if not jnp.issubdtype(one.dtype, jnp.inexact):
                found, one = found.astype(jnp.float32), one.astype(jnp.float32)
            # Products of other shapes round otherwise; a chip may round their inputs too.
            allowed = 8 * max(float(jnp.finfo(one.dtype).eps), 1e-3) * float(abs(one).max())
            error = float(abs(found - one).max())
            if error > allowed:
                raise ValueError(
                    f"tiled: fn is not position-wise along axis {axis}: in tiles of {half} "
                    f"positions its values differ by {error:.2g} from those of {count} at once; "
                    "a position of y depends on other positions of x"
                )


def _random(aval, generator):
    """Returns an array of a type: random floats, zeros for integers, or copies of one key."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), aval.shape)
    if jnp.issubdtype(aval.dtype, jnp.inexact):
        return jnp.asarray(generator.normal(0, 0.1, aval.shape), aval.dtype)
    return jnp.zeros(aval.shape, aval.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Tiles:
    """The forward and the backward pass of one tiled function; a `Walk` of `custom_gradient.py`.

    Its arguments are the leaves of `*args`, the leaves of x, and the arrays that the function
    closes over.

    Attributes:
      calls: `call(x, args, consts) -> y` over lists of leaves: for a whole tile, and for a shorter
        last tile if there is one.
      length: The number of positions.
      size: The number of positions in a tile.
      axis: The axis of positions.
      out: The types of the leaves of the output.
    """

    calls: tuple[Callable, ...]
    length: int
    size: int
    axis: int
    out: tuple[ShapedArray, ...]

    def _sweep(self, body: Callable, state):
        """Returns the state after `body(call, start, size, state)` of each tile."""
        whole, rest = divmod(self.length, self.size)
        run = lambda n, state: body(self.calls[0], n * self.size, self.size, state)
        state = lax.fori_loop(0, whole, run, state)
        return body(self.calls[1], whole * self.size, rest, state) if rest else state

    def run(self, args, x, consts) -> list:
        """Returns the output."""

        def body(call, start, size, out):
            y = call([_cut(leaf, start, size, self.axis) for leaf in x], args, consts)
            return [self._put(all_of_it, one, start) for all_of_it, one in zip(out, y, strict=True)]

        return self._sweep(body, [zeros(1, aval)[0] for aval in self.out])

    def _put(self, whole, part, start):
        return lax.dynamic_update_slice_in_dim(whole, part, start, self.axis)

    def forward(self, args, asked: Sequence[int]):
        """Returns the output; the residuals are the inputs."""
        given, x, consts = args
        return self.run(*args), (*args, Moving.of(asked, given, x, consts))

    def backward(self, residuals, grads) -> list:
        """Returns the gradients that are asked for: every tile is run and reversed at once."""
        args, x, consts, moving = residuals
        grads, places = instantiated(grads), inexact(x)
        wide = lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
        moved_args, moved_consts = pick(args, moving.params), pick(consts, moving.consts)
        sums = (list(map(wide, moved_args)), list(map(wide, moved_consts)))
        state = ([jnp.zeros_like(leaf) for leaf in pick(x, places)], *sums)

        def body(call, start, size, state):
            grad_x, *sums = state
            cut = lambda leaves: [_cut(leaf, start, size, self.axis) for leaf in leaves]
            _, reverse = differentiate(call, cut(x), args, consts, moving)
            of_x, *shared = reverse(cut(grads))
            pairs = zip(grad_x, of_x, strict=True)
            grad_x = [self._put(all_of_it, one, start) for all_of_it, one in pairs]
            return grad_x, *jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, shared)

        grad_x, of_args, of_consts = self._sweep(body, state)
        of_place = dict(zip(places, grad_x, strict=True))
        narrow = lambda sums, like: [
            total.astype(leaf.dtype) for total, leaf in zip(sums, like, strict=True)
        ]
        of_args, of_consts = narrow(of_args, moved_args), narrow(of_consts, moved_consts)
        return [*of_args, *(of_place[place] for place in moving.carry), *of_consts]

    def out_dim(self, place: int) -> int:
        """Returns the batch axis of an output."""
        del place
        return 0

    def batched(self, args, dims, axis) -> tuple["_Tiles", Sequence]:
        """Returns the tiles of `jax.vmap` of the function, whose leaves have the batch first."""
        (given, x, consts), (dims_given, dims_x, dims_consts) = args, dims
        first = lambda dims: [None if dim is None else 0 for dim in dims]
        pairs = lambda leaves, dims: [moved(x, d, 0) for x, d in zip(leaves, dims, strict=True)]
        x = [widened(leaf, dim, axis) for leaf, dim in zip(x, dims_x, strict=True)]
        in_axes = ([0] * len(x), first(dims_given), first(dims_consts))
        widen = lambda leaves: [widened(leaf, None, axis) for leaf in leaves]
        tiles = dataclasses.replace(
            self,
            calls=tuple(batched_call(call, in_axes, axis) for call in self.calls),
            axis=self.axis + 1 if self.axis >= 0 else self.axis,
            out=tuple(jax.make_jaxpr(widen)(list(self.out)).out_avals),
        )
        return tiles, (pairs(given, dims_given), x, pairs(consts, dims_consts))
