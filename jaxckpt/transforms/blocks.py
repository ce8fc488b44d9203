"""Checks that every way to run blocks shares, made before anything is differentiated."""

from collections.abc import Callable, Sequence

import jax

from jaxckpt.plans import Plan, PlanError, Policy
from jaxckpt.plans.actions import Schedule
from jaxckpt.transforms import policies, tags


def stack_length(params) -> int:
    """Returns L, the leading size that all leaves of `params` share.

    Raises:
      ValueError: No leaves, a scalar leaf, or leading sizes that differ (the leaves are named).
    """
    sizes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        shape = jax.typeof(leaf).shape
        if not shape:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is a scalar; every leaf of a stack's "
                "parameters is [L, ...]"
            )
        sizes.setdefault(shape[0], jax.tree_util.keystr(path))
    if not sizes:
        raise ValueError(
            "params has no arrays, so the number of blocks is unknown; pass jnp.arange(L) as "
            "params for blocks without parameters"
        )
    if len(sizes) > 1:
        found = ", ".join(f"params{path} has {size}" for size, path in sizes.items())
        raise ValueError(f"the leading sizes of a stack's parameters differ: {found}")
    return next(iter(sizes))


def first_block(params):
    """Returns the abstract parameters of one block: every leaf without its leading axis."""
    return jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), params)


def check_carry(block: Callable, carry, *args):
    """Raises if `block(carry, *args)` does not return what it was given.

    Raises:
      ValueError: The structure, a shape or a dtype of the carry changes.
    """
    given = tags.abstract(carry)
    made = jax.eval_shape(block, given, *args)
    if jax.tree.structure(given) != jax.tree.structure(made):
        raise ValueError(
            "a block returns the carry it was given, but the structure changes from "
            f"{jax.tree.structure(given)} to {jax.tree.structure(made)}"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(given), jax.tree.leaves(made), strict=True)
    for (path, before), after in pairs:
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise ValueError(
                f"a block returns the carry it was given, but carry{jax.tree_util.keystr(path)} "
                f"changes from {before.dtype}{list(before.shape)} to "
                f"{after.dtype}{list(after.shape)}"
            )


def check_mesh(*trees):
    """Raises if an array is sharded over an Explicit axis of a mesh, which no slot could follow.

    Raises:
      NotImplementedError: Naming what works.
    """
    for leaf in jax.tree.leaves(trees):
        sharding = jax.typeof(leaf).sharding
        # An array's type tells its sharding over Explicit axes alone.
        if any(axis is not None for axis in sharding.spec):
            raise NotImplementedError(
                f"the schedule executor does not run on Explicit mesh axes (here {sharding.spec}); "
                "make the mesh with axis_types=(jax.sharding.AxisType.Auto, ...), or use "
                "remat='full', 'none' or policies"
            )


def check_schedule(schedule: Schedule, num_blocks: int, nested: bool):
    """Raises unless a schedule given in place of a plan can be run over `num_blocks` blocks.

    Raises:
      IllegalSchedule: An action of it is illegal where it stands.
      ValueError: It is made for another number of blocks.
      NotImplementedError: `nested`, which has no way to follow a schedule.
    """
    if schedule.num_blocks != num_blocks:
        raise ValueError(
            f"{schedule.name} is made for {schedule.num_blocks} blocks, there are {num_blocks}"
        )
    if nested:
        raise NotImplementedError(
            f"{schedule.name} needs the schedule executor; nested=True runs plans, such as 'sqrt'"
        )
    schedule.counts  # noqa: B018  replays it, and raises where it is illegal


def check_policies(plan: Plan, offered: Callable[[Sequence[Policy]], tags.Tags]):
    """Raises if a policy of the plan would find nothing to keep or move.

    Args:
      plan: A plan.
      offered: Called once with the plan's policies, and only if one names something, for the
        block's tags; see `invented.offered`.

    Raises:
      PlanError: As `policies.check`, with the plan's text.
    """
    if not any(policies.needs_tags(stage.policies) for stage in plan.stages):
        return
    found = offered(policies.all_of(plan))
    try:
        for stage in plan.stages:
            policies.check(stage.policies, found)
    except PlanError as error:
        raise PlanError(f"plan {str(plan)!r}: {error}") from None
