"""Recording a block: run it forward, keep its residuals as plain arrays, reverse it later.

`jax.vjp` hands back a function whose leaves are the residuals. A `Recorder` traces it once and
knows which of those leaves are a block's own (to be kept) and which are its parameters or the
consts, or casts of them (to be read again instead of copied once a block).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from jaxckpt.transforms import jaxprs
from jaxckpt.transforms.custom_gradient import inexact, pick
from jaxckpt.transforms.traced_block import zeros


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Moving:
    """Which leaves of a stack are differentiated; static where JAX expects arrays.

    Attributes:
      params: Positions among the parameters.
      carry: Positions among the carry's leaves whose gradients the caller asks for; the blocks
        make those of all.
      consts: Positions among the consts.
      outputs: Positions among a block's outputs that have gradients; None for all inexact ones.
    """

    params: tuple[int, ...]
    carry: tuple[int, ...]
    consts: tuple[int, ...]
    outputs: tuple[int, ...] | None = None

    @classmethod
    def all_of(cls, params: Sequence, consts: Sequence) -> "Moving":
        """Returns every parameter and const that can have a gradient."""
        return cls(params=tuple(inexact(params)), carry=(), consts=tuple(inexact(consts)))

    @classmethod
    def of(
        cls, asked: Sequence[int], params: Sequence, carry: Sequence, consts: Sequence
    ) -> "Moving":
        """Returns the leaves that are asked for, by their positions among all of them."""
        starts = (0, len(params), len(params) + len(carry))
        groups = [
            tuple(place - start for place in asked if 0 <= place - start < len(group))
            for start, group in zip(starts, (params, carry, consts), strict=True)
        ]
        return cls(params=groups[0], carry=groups[1], consts=groups[2])


def differentiate(
    call: Callable, carry: Sequence, params_i: Sequence, consts: Sequence, moving: Moving
):
    """Runs a block under `jax.vjp` with respect to its carry and the leaves that are asked for.

    What is not differentiated leaves no residuals: not a rotary table's products, not the inputs
    of frozen weights.

    Args:
      call: `call(carry, params_i, consts) -> carry` over lists of leaves.
      carry: The block's input.
      params_i: The block's parameters.
      consts: What all blocks share.
      moving: Which of the latter two are differentiated.

    Returns:
      `(out, reverse)`: the block's output, and `reverse(grads)` from the gradients of its moving
      leaves to those of the moving leaves of `carry`, `params_i` and `consts`.
    """
    groups = (carry, params_i, consts)
    places = [inexact(carry), moving.params, moving.consts]
    of_outputs = moving.outputs

    def fn(*moving):
        full = [list(group) for group in groups]
        for group, positions, leaves in zip(full, places, moving, strict=True):
            for position, leaf in zip(positions, leaves, strict=True):
                group[position] = leaf
        out = call(*full)
        return pick(out, inexact(out) if of_outputs is None else of_outputs), out

    inputs = [pick(group, positions) for group, positions in zip(groups, places, strict=True)]
    _, reverse, out = jax.vjp(fn, *inputs, has_aux=True)
    return out, reverse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorder:
    """A block traced once, split into the run that keeps residuals and their reversal.

    Attributes:
      run: From carry, parameters and consts to the output's and the residuals' leaves.
      num_carry: Leaves of the carry.
      num_out: Leaves of the block's output.
      residual_tree: The structure of `jax.vjp`'s function.
      sources: For each of its leaves, the position among the inputs it is read from again, or
        None where it is kept.
      casts: For each of its leaves, the dtypes that the input is cast to one after another, such
        as a float32 weight to bfloat16.
    """

    run: core.ClosedJaxpr
    num_carry: int
    num_out: int
    residual_tree: Any
    sources: tuple[int | None, ...]
    casts: tuple[tuple[Any, ...], ...]

    @classmethod
    def trace(cls, call: Callable, carry, params_i, consts, moving: Moving) -> "Recorder":
        """Returns the recorder of a block; arguments as in `differentiate`, abstract ones too."""
        trees = []

        def recorded(*groups):
            out, reverse = differentiate(call, *groups, moving=moving)
            leaves, tree = jax.tree.flatten(reverse)
            trees.append((tree, len(out)))
            return out, leaves

        run = jax.make_jaxpr(recorded)(carry, params_i, consts)
        tree, num_out = trees[-1]
        # A residual that is an input after the carry is a parameter or a const.
        shared = {
            var: (place, ()) for place, var in enumerate(run.jaxpr.invars) if place >= len(carry)
        }
        for equation in run.jaxpr.eqns:
            found = _cast_of(equation, shared)
            if found is not None:
                shared[equation.outvars[0]] = found
        residuals = run.jaxpr.outvars[num_out:]
        found = [
            (None, ()) if isinstance(var, core.Literal) else shared.get(var, (None, ()))
            for var in residuals
        ]
        sources, casts = zip(*found, strict=True) if found else ((), ())
        return cls(
            run=run,
            num_carry=len(carry),
            num_out=num_out,
            residual_tree=tree,
            sources=sources,
            casts=casts,
        )

    def empty(self, num_blocks: int) -> list[jax.Array]:
        """Returns room for blocks' kept residuals, each leaf in the memory its policy says."""
        residuals = self.run.out_avals[self.num_out :]
        return [
            zeros(num_blocks, aval)
            for aval, source in zip(residuals, self.sources, strict=True)
            if source is None
        ]

    def record(self, carry: Sequence, params_i: Sequence, consts: Sequence):
        """Runs the block; returns `(out, kept)`, two lists of leaves."""
        leaves = core.jaxpr_as_fun(self.run)(*carry, *params_i, *consts)
        out, residuals = leaves[: self.num_out], leaves[self.num_out :]
        pairs = zip(residuals, self.sources, strict=True)
        return out, [leaf for leaf, source in pairs if source is None]

    def reverse(self, kept: Sequence, params_i: Sequence, consts: Sequence) -> Callable:
        """Returns the block's `reverse`, rebuilt from its kept residuals."""
        fresh = iter(kept)
        shared: list[Any] = [None] * self.num_carry + [*params_i, *consts]
        leaves = []
        for source, dtypes in zip(self.sources, self.casts, strict=True):
            leaf = next(fresh) if source is None else shared[source]
            for dtype in dtypes:
                leaf = lax.convert_element_type(leaf, dtype)
            leaves.append(leaf)
        return jax.tree.unflatten(self.residual_tree, leaves)


def _cast_of(equation: core.JaxprEqn, shared: dict) -> tuple[int, tuple] | None:
    """Returns `(input, dtypes)` if an equation casts what is shared, else None."""
    if equation.primitive.name != jaxprs.CAST:
        return None
    source = equation.invars[0]
    if isinstance(source, core.Literal) or source not in shared:
        return None
    place, dtypes = shared[source]
    made: Any = equation.outvars[0].aval
    return place, (*dtypes, made.dtype)
