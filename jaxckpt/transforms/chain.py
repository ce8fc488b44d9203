"""`chain`: different blocks one after another, under any plan.

    y = jaxckpt.chain([embed, *blocks, head], x, remat="uniform:3")

A block is a function of the carry; the carry may change its shape from block to block, and what
a block closes over (its parameters, say) gets gradients too. Every block is traced by itself, so
tracing and compiling take time in proportion to their number.
"""

from collections.abc import Callable, Sequence

import jax

from jaxckpt.plans import Plan, as_plan
from jaxckpt.transforms import nested, tags
from jaxckpt.transforms.blocks import check_policies


def chain(blocks: Sequence[Callable], carry, *, remat: str | Plan = "sqrt"):
    """Runs different blocks one after another, checkpointed by a plan.

    Args:
      blocks: Functions `carry -> carry`; shapes may change from one to the next.
      carry: The first block's input, any pytree of arrays.
      remat: A plan or its text. A name counts as matched if any block has it.

    Returns:
      The last block's output; differentiable in `carry` and in what the blocks close over.

    Raises:
      PlanError: The plan does not parse, does not fit the blocks, or names what no block has.
      ValueError: No blocks.
      NotImplementedError: A schedule that needs more than nested `jax.checkpoint`.
    """
    blocks = tuple(blocks)
    if not blocks:
        raise ValueError("a chain needs at least one block")
    given = as_plan(remat)
    plan = given.bind(len(blocks))
    check_policies(given, lambda: _tags_of(blocks, carry))
    apply = lambda carry, block: block(carry)
    start = 0
    for stage in plan.stages:
        part = nested.Listed(blocks=blocks[start : start + stage.count])
        carry = nested.run_stage(part, apply, carry, stage)
        start += stage.count
    return carry


def _tags_of(blocks: Sequence[Callable], carry) -> tags.Tags:
    """Returns the tags of all blocks together."""
    carry, names, attention = tags.abstract(carry), set(), False
    for block in blocks:
        found = tags.tags_of(block, carry)
        names.update(found.names)
        attention = attention or found.attention
        carry = jax.eval_shape(block, carry)
    return tags.Tags(names=tuple(sorted(names)), attention=attention)
