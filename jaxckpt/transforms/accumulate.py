"""Gradient accumulation in place: the gradients of microbatches are added up block by block.

    add = accumulate.adding(loss, blocks=lambda params: params["layers"])
    value, totals = add(params, totals, microbatch)     # in a loop whose carry is the totals

The summed gradients need the memory of the parameters, and the gradients of one microbatch need the
same amount again. Here the reverse loop of a stack adds each block's gradient to the totals as soon
as it is complete. Beside the totals there is never more than the gradient of one block.
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
      `add(params, totals, *args) -> (value, totals)`; the totals have the structure and shapes of
      the parameters.
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
        # Marks are differentiated too, which finds a second use of the stack's parameters.
        run = jax.value_and_grad(value_of, (0, 1, 2, 3))
        others = [leaves[n] for n in rest]
        value, (grads, _, rows, _) = run(others, stack, rows, jnp.zeros([2], jnp.float32))
        made = dict(zip(places, rows, strict=True))
        made |= {n: sums[n] + grad for n, grad in zip(rest, grads, strict=True)}
        return value, jax.tree.unflatten(tree, [made[n] for n in range(len(leaves))])

    return add
