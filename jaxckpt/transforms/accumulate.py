"""Gradients of several parts of a batch, added up in place.

    add = accumulate.adding(loss, blocks=lambda params: params["layers"])
    value, totals = add(params, totals, part)      # in a loop over parts, totals in its carry

The gradients of one part of a batch weigh as much as the parameters, and so do the totals. Here the
reverse loop of a stack adds a block's gradient to its row of the totals as soon as it is whole, so
that there is never more than one block's beside them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxckpt.transforms.stack_update import Attached
from jaxckpt.transforms.update_in_backward import mark, places_of, value_with


def adding(loss: Callable, blocks: Callable) -> Callable:
    """Returns a function that adds a loss's gradients to totals.

    Args:
      loss: `loss(params, *args) -> scalar`, as for `update_in_backward`.
      blocks: `blocks(params)` returns the part of the parameters that is stacked.

    Returns:
      `add(params, totals, *args) -> (value, totals)`; the totals are like the parameters.
    """

    def add(params, totals, *args):
        leaves, tree = jax.tree.flatten(params)
        sums = jax.tree.leaves(totals)
        places = places_of(blocks, tree)
        rest = [n for n in range(len(leaves)) if n not in places]
        stack = [leaves[n] for n in places]

        def value_of(others, marks, rows, told):
            one = Attached(
                marks=list(map(mark, marks)),
                params=stack,
                replaces=False,
                rows=rows,
                told=told,
                update=lambda grads, _, rows: ([], list(map(jnp.add, rows, grads))),
                skips=False,
            )
            return value_with(one, loss, tree, dict(zip(rest, others, strict=True)), places, *args)

        rows = [sums[n] for n in places]
        # Marks are differentiated so that a second use of the stack's parameters is found.
        run = jax.value_and_grad(value_of, (0, 1, 2, 3))
        others = [leaves[n] for n in rest]
        value, (grads, _, rows, _) = run(others, stack, rows, jnp.zeros([2], jnp.float32))
        made = dict(zip(places, rows, strict=True))
        made |= {n: sums[n] + grad for n, grad in zip(rest, grads, strict=True)}
        return value, jax.tree.unflatten(tree, [made[n] for n in range(len(leaves))])

    return add
