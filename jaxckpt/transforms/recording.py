"""Recording a block: run it forward, keep its residuals as plain arrays, reverse it later.

`jax.vjp` hands back a function whose leaves are the residuals. A `Recorder` traces it once and
knows which of those leaves are a block's own (to be kept) and which are its parameters or the
consts (to be read again instead of copied once a block).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def inexact(leaves: Sequence) -> list[int]:
    """Returns the positions of the leaves that have gradients: floating and complex ones."""
    return [
        position
        for position, leaf in enumerate(leaves)
        if jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact)
    ]


def pick(leaves: Sequence, positions: Sequence[int]) -> list:
    """Returns the leaves at `positions`."""
    return [leaves[position] for position in positions]


def spread(grads: Sequence, places: Sequence[int], like: Sequence) -> list:
    """Returns a list like `like` with `grads` at `places` and None elsewhere."""
    found = dict(zip(places, grads, strict=True))
    return [found.get(position) for position in range(len(like))]


def differentiate(call: Callable, carry: Sequence, params_i: Sequence, consts: Sequence):
    """Runs a block under `jax.vjp` with respect to every leaf that has a gradient.

    Args:
      call: `call(carry, params_i, consts) -> carry` over lists of leaves.
      carry: The block's input.
      params_i: The block's parameters.
      consts: What all blocks share.

    Returns:
      `(out, reverse)`: the block's output, and `reverse(grads)` from the gradients of its inexact
      leaves to those of `carry`, `params_i` and `consts`.
    """
    groups = (carry, params_i, consts)
    places = [inexact(group) for group in groups]

    def fn(*moving):
        full = [list(group) for group in groups]
        for group, positions, leaves in zip(full, places, moving, strict=True):
            for position, leaf in zip(positions, leaves, strict=True):
                group[position] = leaf
        out = call(*full)
        return pick(out, inexact(out)), out

    moving = [pick(group, positions) for group, positions in zip(groups, places, strict=True)]
    _, reverse, out = jax.vjp(fn, *moving, has_aux=True)
    return out, reverse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorder:
    """A block traced once, split into the run that keeps residuals and their reversal.

    Attributes:
      run: From carry, parameters and consts to the output's and the residuals' leaves.
      num_carry: Leaves of the carry.
      residual_tree: The structure of `jax.vjp`'s function.
      sources: For each of its leaves, the position among the inputs it is read from again, or
        None where it is kept.
    """

    run: core.ClosedJaxpr
    num_carry: int
    residual_tree: Any
    sources: tuple[int | None, ...]

    @classmethod
    def trace(cls, call: Callable, carry, params_i, consts) -> "Recorder":
        """Returns the recorder of a block; arguments as in `differentiate`, abstract ones too."""
        trees = []

        def recorded(*groups):
            out, reverse = differentiate(call, *groups)
            leaves, tree = jax.tree.flatten(reverse)
            trees.append(tree)
            return out, leaves

        run = jax.make_jaxpr(recorded)(carry, params_i, consts)
        # A residual that is an input after the carry is a parameter or a const.
        shared = {var: place for place, var in enumerate(run.jaxpr.invars) if place >= len(carry)}
        residuals = run.jaxpr.outvars[len(carry) :]
        sources = tuple(
            None if isinstance(var, core.Literal) else shared.get(var) for var in residuals
        )
        return cls(run=run, num_carry=len(carry), residual_tree=trees[-1], sources=sources)

    def empty(self, num_blocks: int) -> list[jax.Array]:
        """Returns room for the kept residuals of blocks, each leaf in the memory its policy says."""
        residuals = self.run.out_avals[self.num_carry :]
        return [
            jax.device_put(jnp.zeros((num_blocks, *aval.shape), aval.dtype), aval.memory_space)
            for aval, source in zip(residuals, self.sources, strict=True)
            if source is None
        ]

    def record(self, carry: Sequence, params_i: Sequence, consts: Sequence):
        """Runs the block; returns `(out, kept)`, two lists of leaves."""
        leaves = core.jaxpr_as_fun(self.run)(*carry, *params_i, *consts)
        out, residuals = leaves[: self.num_carry], leaves[self.num_carry :]
        pairs = zip(residuals, self.sources, strict=True)
        return out, [leaf for leaf, source in pairs if source is None]

    def reverse(self, kept: Sequence, params_i: Sequence, consts: Sequence) -> Callable:
        """Returns the block's `reverse`, rebuilt from its kept residuals."""
        kept = iter(kept)
        shared = [None] * self.num_carry + [*params_i, *consts]
        leaves = [next(kept) if source is None else shared[source] for source in self.sources]
        return jax.tree.unflatten(self.residual_tree, leaves)
