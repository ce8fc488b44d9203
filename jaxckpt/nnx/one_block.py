"""`remat_of`: each call of an NNX class under `jax.checkpoint`, wherever its code is.

    with jaxckpt.nnx.remat_of(Block, "dots"):
        y = model(x)

A plan for one block is `none`, `full` or policies.
"""

from collections.abc import Callable, Sequence

from flax import nnx

from jaxckpt.nnx.state import (
    flat_state,
    nodes_apart,
    pure_call,
    replaced_places,
    values_of,
    with_values,
)
from jaxckpt.plans import Plan
from jaxckpt.plans.errors import shown
from jaxckpt.transforms.region import checkpointed, plan_of_one, replaced


def remat_of(
    block: type[nnx.Module],
    plan: str | Plan | Callable,
    *,
    methods: Sequence[str] = ("__call__",),
    prevent_cse: bool = True,
):
    """A context in which each call of an NNX class is checkpointed, wherever its code is.

    It works like `jaxckpt.remat_of`. State that a call changes, such as counters of dropout and
    batch statistics, is changed once.

    Args:
      block: The class.
      plan: `none`, `full`, or policies such as `"dots"`; or a policy of `jax.checkpoint`.
      methods: Names of the methods that are checkpointed.
      prevent_cse: As in `jax.checkpoint`; False inside a loop.

    Raises:
      PlanError: The plan is for several blocks. At a call: a name of the plan matches nothing in
        the block.
      ValueError: `block` is no class of NNX modules, the class has no such method, no module of the
        class was called, or a call makes variables.

    Example:
      >>> import jax.numpy as jnp, jaxckpt
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), jnp.tanh)
      >>> def loss(model):
      ...     with jaxckpt.nnx.remat_of(nnx.Linear, "full"):
      ...         return model(jnp.ones([4, 8])).sum()
      >>> nnx.grad(loss)(model)["layers"][0]["kernel"].shape
      (8, 8)
    """
    if not (isinstance(block, type) and issubclass(block, nnx.Module)):
        raise ValueError(f"nnx.remat_of takes a class of NNX modules, not {shown(block)}")
    bound, given = plan_of_one(plan, "nnx.remat_of wraps one", "nnx.Stack takes every plan")

    def wrap(method: Callable) -> Callable:
        def call(*args, **named):
            nodes, others, merge = nodes_apart((args, named))
            changed = []

            def use(nodes: list, others: list):
                args, named = merge(nodes, others)
                return method(*args, **named)

            def pure(values: list, others: list):
                result, after = pure_call(nodes, use)(values, others)
                changed[:] = replaced_places(values, after)
                return result, [after[place] for place in changed]

            state = flat_state(nodes)
            result, after = checkpointed(pure, bound, given, prevent_cse)(values_of(state), others)
            if changed:
                nnx.update(nodes, with_values(state, dict(zip(changed, after, strict=True))))
            return result

        return call

    return replaced(block, methods, wrap, bound, given, "nnx.remat_of")
