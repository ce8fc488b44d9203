"""`checkpoint`: one function of any shape under a plan, a drop-in for `jax.checkpoint`.

    stage = jaxckpt.checkpoint(stage, remat="dots")
    y = stage(params, x, train=True)

What a region keeps is `none`, `full` or policies: what one block can follow. Schedules are for
several blocks (`scan_blocks`, `run`, `chain`, `scan`).
"""

import functools
from collections.abc import Callable

import jax

from jaxckpt.plans import Plan, PlanError
from jaxckpt.plans.errors import shown
from jaxckpt.transforms import value_names
from jaxckpt.transforms.arguments import apart
from jaxckpt.transforms.checkpointed import Remat
from jaxckpt.transforms.checks import check_policies, check_rerun
from jaxckpt.transforms.policies import GivenPolicy, plan_and_policy
from jaxckpt.transforms.traced_block import as_arrays, trace_block


def checkpoint(fn: Callable, *, remat: str | Plan | Callable = "full", prevent_cse: bool = True):
    """Returns `fn` with its residuals chosen by a plan; values and gradients stay the same.

    Arguments that are Python values (`True`, `"gelu"`, a function) stay what they are, by position
    and by keyword. What `fn` closes over gets gradients.

    Args:
      fn: A pure function of pytrees, which returns any pytree of arrays.
      remat: `none`, `full`, or policies such as `"dots"`, `"names:q,k"`, `"attention"` or
        `"full+offload:carry"`; or a policy of `jax.checkpoint`.
      prevent_cse: As in `jax.checkpoint`; False inside a loop.

    Returns:
      A function of the same arguments.

    Raises:
      PlanError: A plan for several blocks; when the function is called, a name that matches nothing
        in it, or a step of it that must happen once.
      ValueError: `fn` is no function.

    Example:
      >>> import jax, jax.numpy as jnp, jaxckpt
      >>> stage = jaxckpt.checkpoint(lambda w, x: jnp.sin(jnp.sin(x @ w)), remat="dots")
      >>> jax.grad(lambda w, x: stage(w, x).sum())(jnp.ones([4, 4]), jnp.ones([2, 4])).shape
      (4, 4)
    """
    if not callable(fn):
        raise ValueError(f"checkpoint takes a function, not {shown(fn)}")
    others = "scan_blocks, run, chain and scan take every plan"
    plan, given = plan_of_one(remat, "checkpoint takes one function", others)
    return fn if plan.stages[0].schedule == "none" else checkpointed(fn, plan, given, prevent_cse)


def plan_of_one(remat, taker: str, others: str) -> tuple[Plan, GivenPolicy | None]:
    """Returns the plan of one block, and the user's own policy if there is one.

    Args:
      remat: What the user gave.
      taker: What takes one block, for the error.
      others: What takes every plan, for the error.

    Raises:
      PlanError: The plan speaks of several blocks.
    """
    plan, given = plan_and_policy(remat)
    stage = plan.stages[0]
    if len(plan.stages) > 1 or stage.count or stage.schedule not in ("none", "full"):
        raise PlanError(
            f"plan {str(plan)!r} speaks of several blocks, {taker}; it takes none, full and "
            f"policies such as 'dots' or 'attention'; {others}"
        )
    return plan, given


def checkpointed(
    fn: Callable, plan: Plan, given: GivenPolicy | None = None, prevent_cse: bool = True
) -> Callable:
    """Returns `fn` under `jax.checkpoint`, traced once a call, checked against its plan."""
    policies = plan.stages[0].policies
    checkpoint = Remat(policies=policies, given=given)

    @functools.wraps(fn)
    def region(*args, **named):
        arrays, merge = apart((args, named))

        def call(arrays, _):
            args, named = merge(arrays)
            return fn(*args, **named)

        arrays = as_arrays(arrays)
        traced, consts = trace_block(call, arrays, ())
        check_rerun(traced, plan, given)
        check_policies(plan, lambda asked: value_names.offered(traced.call, asked, *traced.inputs))
        block = value_names.resolved(traced.call, policies)
        run = checkpoint(lambda arrays, consts: block(arrays, [], consts), prevent_cse=prevent_cse)
        return jax.tree.unflatten(jax.tree.structure(traced.out), run(arrays, consts))

    return region
