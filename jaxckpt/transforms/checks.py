"""Checks that every way to run blocks shares, made before anything is differentiated."""

import contextlib
import inspect
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxckpt.plans import Plan, PlanError, Policy, words
from jaxckpt.plans.errors import shown
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms import jaxprs, policies, tags, value_names
from jaxckpt.transforms.traced_block import TracedBlock, abstract


def stack_length(params, name: str = "params") -> int:
    """Returns L, the leading size that all leaves of `params` share.

    Args:
      params: A pytree.
      name: The user's name for the pytree, for the error's text.

    Raises:
      ValueError: There are no leaves, a leaf is a scalar, or leading sizes differ.
    """
    sizes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        shape = jax.typeof(leaf).shape
        if not shape:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is a scalar; every leaf is [L, ...]"
            )
        sizes.setdefault(shape[0], jax.tree_util.keystr(path))
    if not sizes:
        raise ValueError(
            f"{name} has no arrays, so the number of blocks is unknown; pass jnp.arange(L) as "
            f"{name} for blocks without parameters"
        )
    if len(sizes) > 1:
        found = ", ".join(f"{name}{path} has {size}" for size, path in sizes.items())
        raise ValueError(f"the leading sizes of {name} differ: {found}")
    return next(iter(sizes))


def steps_of(xs, length: int | None) -> int:
    """Returns the number of steps of a scan.

    Raises:
      ValueError: `length` is no whole number, differs from the leading size of the xs, or is
        missing where there are no xs.
    """
    if length is not None and (isinstance(length, bool) or not hasattr(length, "__index__")):
        raise ValueError(f"length is a whole number of steps, not {shown(length)}")
    if length is not None and operator.index(length) < 0:
        raise ValueError(f"length is a number of steps, at least 0, not {length}")
    if not jax.tree.leaves(xs):
        if length is None:
            raise ValueError("scan has no xs, so the number of steps is unknown; give length=")
        return operator.index(length)
    found = stack_length(xs, "xs")
    if length is not None and operator.index(length) != found:
        raise ValueError(f"length is {length}, but the leading size of xs is {found}")
    return found


def check_pair(made):
    """Raises `ValueError` unless a step of a scan returned `(carry, y)`."""
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise ValueError(
            f"f of a scan returns a pair (carry, y), not {jax.tree.structure(made)}; return None "
            "as y for no output"
        )


def check_stack(block, params, consts: tuple):
    """Raises if the arguments of a stack are in the wrong order, before anything is traced.

    Raises:
      ValueError: `block` is no function, `params` is one, or a const is a plan.
    """
    if not callable(block):
        raise ValueError(
            "the first argument is the block, a function block(carry, params_i, *consts); got "
            f"{_kind(block)}"
        )
    if inspect.isroutine(params):
        raise ValueError("the second argument is the blocks' parameters; got a function")
    check_consts(consts)


def check_consts(consts: tuple):
    """Raises `ValueError` if a plan was given by position rather than as `remat=`."""
    for const in consts:
        if isinstance(const, str | Plan):
            raise ValueError(f"{str(const)!r} is no array; a plan is given as remat={str(const)!r}")


def _kind(value) -> str:
    shape = getattr(value, "shape", None)
    what = "an array" if shape is not None else f"a {type(value).__name__}"
    return f"{what} of arrays" if isinstance(value, dict | list | tuple) else what


@contextlib.contextmanager
def lists_explained(params):
    """A context that explains the error of a block whose `params` are a list of layers.

    Raises:
      ValueError: An error was raised inside, and `params` is a list of equal trees.
    """
    try:
        yield
    except Exception as error:  # the user's block may raise anything
        if not isinstance(params, list | tuple) or len(params) < 2:
            raise
        alike = {(jax.tree.structure(one), _shapes(one)) for one in params}
        if len(alike) > 1:
            raise
        raise ValueError(
            f"params is a list of {len(params)} trees, and the block cannot read it; jaxckpt.run "
            "takes a list as it is, and this stacks it: "
            "jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)"
        ) from error


def _shapes(tree) -> tuple:
    return tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(tree))


def check_carry(given, made, block: str = "a block"):
    """Raises if a block's output differs in type from its input.

    Args:
      given: The block's input, arrays or abstract.
      made: The block's output, arrays or abstract.
      block: The block's name for the user.

    Raises:
      ValueError: The structure, a shape or a dtype of the carry changes.
    """
    given, made = abstract((given, made))
    if jax.tree.structure(given) != jax.tree.structure(made):
        parts = made.values() if isinstance(made, dict) else made
        is_inside = isinstance(made, tuple | list | dict) and any(
            jax.tree.structure(one) == jax.tree.structure(given) for one in parts
        )
        raise ValueError(
            f"{block} returns the carry it was given, but the structure changes from "
            f"{jax.tree.structure(given)} to {jax.tree.structure(made)}"
            + "; jaxckpt.scan takes a block that returns (carry, y), and run and Stack take out=, "
            "the place of the carry in the result" * is_inside
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(given), jax.tree.leaves(made), strict=True)
    for (path, before), after in pairs:
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise ValueError(
                f"{block} returns the carry it was given, but carry{jax.tree_util.keystr(path)} "
                f"changes from {before.dtype}{list(before.shape)} to "
                f"{after.dtype}{list(after.shape)}"
            )


def check_rerun(
    block: TracedBlock,
    remat: Plan | Schedule,
    given: policies.GivenPolicy | None = None,
    nested: bool = False,
):
    """Raises if a block cannot be recomputed, or a policy keeps values that JAX cannot keep.

    `jax.checkpoint` decides which effects may be repeated; it is asked before anything runs.

    Args:
      block: The block.
      remat: The plan or schedule that the block runs under.
      given: The user's own policy, which replaces the plan's policies; None if the user gave none.
      nested: Whether schedules are run by nested `jax.checkpoint`.

    Raises:
      PlanError: The block has an effect that must happen once, or one of `checkify` under a
        schedule; or a complex value would be kept.
    """
    stages = remat.stages if isinstance(remat, Plan) else ()
    if stages and all(stage.schedule == "none" for stage in stages):
        return
    found = [e.primitive.name for e in jaxprs.equations(block.jaxpr) if e.effects]
    is_scheduled = not stages or any(words.SCHEDULES[one.schedule].makes for one in stages)
    if jaxprs.CHECK in found and is_scheduled and not nested:
        raise PlanError(
            f"{str(remat)!r} runs blocks by loops of its own, and checkify does not see a check in "
            "them; none, full and policies have it, and so has scan_blocks(..., nested=True)"
        )
    # The block's inputs are not differentiated here: the question is whether its effects may be
    # repeated, not whether it has a derivative.
    beside = lambda x, *inputs: (jnp.sin(x), block.call(*jax.lax.stop_gradient(inputs)))
    if found and _refusal(beside, 0.0, *block.inputs) is not None:
        raise PlanError(
            f"{str(given or remat)!r} runs blocks again, and the block has an effect that must "
            f"happen once ({', '.join(dict.fromkeys(found))}); remat='none' runs each block once, "
            "jax.pure_callback may be run again"
        )
    dtypes = {getattr(aval, "dtype", None) for aval in _avals(block)}
    if not any(
        dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes
    ):
        return
    for stage in stages:
        policy = given or policies.checkpoint_policy(stage.inner_policies)
        call = value_names.resolved(block.call, stage.inner_policies)
        error = policy and _refusal(call, *block.inputs, policy=policy)
        if error:
            raise PlanError(
                f"plan {str(given or remat)!r} keeps complex values of the block, which "
                f"jax.checkpoint cannot do ({error}); use none, full, or a schedule without "
                "policies"
            )


def _avals(block: TracedBlock):
    yield from block.jaxpr.in_avals
    for equation in jaxprs.equations(block.jaxpr):
        yield from (var.aval for var in equation.outvars)


def _refusal(fn: Callable, *args, policy: Callable | None = None) -> str | None:
    """Returns why JAX refuses to differentiate `fn` under a checkpoint; None if it does not."""
    try:
        jaxprs.linearized(jax.checkpoint(fn, policy=policy), *args)
    except (NotImplementedError, TypeError, ValueError) as error:
        return str(error).partition("\n")[0]
    return None


def check_schedule(schedule: Schedule, num_blocks: int, nested: bool):
    """Raises unless a schedule given in place of a plan can be run over `num_blocks` blocks.

    Raises:
      IllegalSchedule: An action is illegal in its place.
      ValueError: The schedule is for another number of blocks.
      NotImplementedError: `nested` is set, and nested `jax.checkpoint` cannot follow a schedule.
    """
    if schedule.num_blocks != num_blocks:
        raise ValueError(
            f"{schedule.name} is made for {schedule.num_blocks} blocks, there are {num_blocks}"
        )
    if nested:
        raise NotImplementedError(
            f"{schedule.name} needs the schedule executor; nested=True runs plans, such as 'sqrt'"
        )
    schedule.counts  # noqa: B018  replays the schedule, and raises if it is illegal


def check_policies(plan: Plan, offered: Callable[[Sequence[Policy]], tags.Tags]):
    """Raises if a policy of the plan would find nothing to keep or move.

    Args:
      plan: A plan.
      offered: Called with the plan's policies, returns the block's tags; see
        `value_names.offered`. It is called only if a policy names something.

    Raises:
      PlanError: See `policies.check`; the text begins with the plan.
    """
    if not any(policies.needs_tags(stage.policies) for stage in plan.stages):
        return
    found = offered(policies.all_of(plan))
    try:
        for stage in plan.stages:
            policies.check(stage.policies, found)
    except PlanError as error:
        raise PlanError(f"plan {str(plan)!r}: {error}") from None
