"""Hoisting: a block as a closed function of flat leaves; what it closed over becomes an argument.

A function under `jax.custom_vjp` must not close over traced values, and what a block closes over
is to get gradients too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hoisted:
    """A block that closes over nothing.

    Attributes:
      call: `call(carry, params_i, consts) -> carry`, all of them lists of leaves.
      consts: The const leaves: the caller's, then those the block closed over.
      out: The block's output, abstract.
    """

    call: Callable
    consts: list[Any]
    out: Any

    @property
    def out_tree(self):
        """The structure of the block's output."""
        return jax.tree.structure(self.out)


def hoist(block: Callable, carry, params_i=(), consts=()) -> Hoisted:
    """Returns `block(carry, params_i, *consts)` with every closed-over array as a const.

    Args:
      block: The block.
      carry: Its input, arrays or abstract.
      params_i: One block's parameters, abstract.
      consts: A tuple of arrays.
    """
    carry_leaves, carry_tree = jax.tree.flatten(carry)
    params_leaves, params_tree = jax.tree.flatten(params_i)
    const_leaves, consts_tree = jax.tree.flatten(consts)

    def flat(carry, params_i, consts):
        return block(
            jax.tree.unflatten(carry_tree, carry),
            jax.tree.unflatten(params_tree, params_i),
            *jax.tree.unflatten(consts_tree, consts),
        )

    closed, out = jax.make_jaxpr(flat, return_shape=True)(carry_leaves, params_leaves, const_leaves)
    given = len(const_leaves)

    def call(carry, params_i, consts):
        body = core.ClosedJaxpr(closed.jaxpr, consts[given:])
        return core.jaxpr_as_fun(body)(*carry, *params_i, *consts[:given])

    return Hoisted(call=call, consts=[*const_leaves, *closed.consts], out=out)
