"""Recording a block: run it forward, keep its residuals as plain arrays, reverse it later.

`jax.vjp` returns a function whose leaves are the residuals. A `Recorder` traces it once and divides
the residuals into two groups. Values that the block computes are kept. Parameters, consts,
constants, and their casts, transposes and broadcasts are recomputed, because keeping them would
copy them once for each block.
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
      params: Positions of the differentiated leaves among the parameters.
      carry: Positions of the leaves of the first carry whose gradients the caller asks for. Every
        block differentiates its whole carry.
      consts: Positions of the differentiated leaves among the consts.
      outputs: Positions of the block's outputs that have gradients; None for all inexact outputs.
    """

    params: tuple[int, ...]
    carry: tuple[int, ...]
    consts: tuple[int, ...]
    outputs: tuple[int, ...] | None = None

    @classmethod
    def all_of(cls, params: Sequence, consts: Sequence) -> "Moving":
        """Returns a `Moving` of every parameter and const that can have a gradient."""
        return cls(params=tuple(inexact(params)), carry=(), consts=tuple(inexact(consts)))

    @classmethod
    def of(
        cls, asked: Sequence[int], params: Sequence, carry: Sequence, consts: Sequence
    ) -> "Moving":
        """Returns a `Moving` of the positions `asked`, counted through all three groups."""
        starts = (0, len(params), len(params) + len(carry))
        groups = [
            tuple(place - start for place in asked if 0 <= place - start < len(group))
            for start, group in zip(starts, (params, carry, consts), strict=True)
        ]
        return cls(params=groups[0], carry=groups[1], consts=groups[2])


def differentiate(
    call: Callable, carry: Sequence, params_i: Sequence, consts: Sequence, moving: Moving
):
    """Runs a block under `jax.vjp` with respect to its carry and the `moving` leaves.

    Leaves that are not differentiated need no residuals: a frozen weight does not keep its input.

    Args:
      call: `call(carry, params_i, consts) -> carry` over lists of leaves.
      carry: The block's input.
      params_i: The block's parameters.
      consts: What all blocks share.
      moving: Which leaves of `params_i` and `consts` are differentiated.

    Returns:
      `(out, reverse)`: the block's output, and a function from the gradients of its `moving`
      outputs to the gradients of the inexact carry and of the moving parameters and consts.
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
      run: From the leaves of carry, parameters and consts to the leaves of output and residuals.
      num_carry: The number of leaves of the carry.
      num_out: The number of leaves of the block's output.
      residual_tree: The tree structure of `jax.vjp`'s function.
      sources: For each residual, the position of the input that it is recomputed from; 0 for a
        constant; None if the residual is kept.
      again: For each residual, the equations that recompute it from its source, in order, such as
        the cast of a float32 weight to bfloat16.
    """

    run: core.ClosedJaxpr
    num_carry: int
    num_out: int
    residual_tree: Any
    sources: tuple[int | None, ...]
    again: tuple[tuple[core.JaxprEqn, ...], ...]

    @classmethod
    def trace(cls, call: Callable, carry, params_i, consts, moving: Moving) -> "Recorder":
        """Returns the recorder of a block; takes `differentiate`'s arguments, or abstract ones."""
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
            found = _made_again(equation, shared)
            if found is not None:
                shared[equation.outvars[0]] = found
        residuals = run.jaxpr.outvars[num_out:]
        found = [
            (None, ()) if isinstance(var, core.Literal) else shared.get(var, (None, ()))
            for var in residuals
        ]
        sources, again = zip(*found, strict=True) if found else ((), ())
        return cls(
            run=run,
            num_carry=len(carry),
            num_out=num_out,
            residual_tree=tree,
            sources=sources,
            again=again,
        )

    def empty(self, num_blocks: int) -> list[jax.Array]:
        """Returns zeros for the kept residuals of some blocks, each in its policy's memory."""
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
        """Returns `differentiate`'s `reverse` of the block, rebuilt from its kept residuals."""
        fresh = iter(kept)
        shared: list[Any] = [None] * self.num_carry + [*params_i, *consts]
        leaves = []
        for source, equations in zip(self.sources, self.again, strict=True):
            leaf = next(fresh) if source is None else shared[source]
            for equation in equations:
                (read,) = equation.invars
                if isinstance(read, core.Literal):
                    constant: Any = read.aval
                    leaf = lax.full((), read.val, constant.dtype)
                leaf = equation.primitive.bind(leaf, **equation.params)
            leaves.append(leaf)
        return jax.tree.unflatten(self.residual_tree, leaves)


# Equations that are recomputed where their result is read. They cost little, and their result may
# be larger than a weight.
_CHEAP = (jaxprs.CAST, jaxprs.BROADCAST, *jaxprs.SHAPES)


def _made_again(equation: core.JaxprEqn, shared: dict) -> tuple[int, tuple] | None:
    """Returns `(input, equations)` if an equation only recasts a shared input, else None."""
    if equation.primitive.name not in _CHEAP or len(equation.invars) > 1:
        return None
    (read,) = equation.invars
    if isinstance(read, core.Literal):
        return 0, (equation,)
    if read not in shared:
        return None
    place, equations = shared[read]
    return place, (*equations, equation)
