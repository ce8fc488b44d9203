"""`checkpoint`: one function of any shape under a plan, a drop-in for `jax.checkpoint`.

    stage = jaxckpt.checkpoint(stage, remat="dots")
    y = stage(params, x, train=True)

    with jaxckpt.remat_of(Block, "dots"):     # each call of a class, wherever it is
        y = model(x)

A plan for one function is `none`, `full` or policies. `jaxckpt.fit` also makes plans of the
function's graph, such as `graph:.../14xnone/30xfull+names:@conv.2/...`: the function is cut into
segments (`cuts.py`), and each segment keeps all its values, only its inputs, or its inputs and
named values. Schedules need several blocks (`scan_blocks`, `run`, `chain`, `scan`).
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

from jaxckpt.plans import Plan, PlanError
from jaxckpt.plans.errors import shown
from jaxckpt.transforms import observers, value_names
from jaxckpt.transforms.arguments import apart
from jaxckpt.transforms.checkpointed import Remat
from jaxckpt.transforms.checks import check_policies, check_rerun
from jaxckpt.transforms.cuts import Opened
from jaxckpt.transforms.observers import StackCall
from jaxckpt.transforms.policies import GivenPolicy, plan_and_policy
from jaxckpt.transforms.traced_block import TracedBlock, as_arrays, trace_block


def checkpoint(fn: Callable, *, remat: str | Plan | Callable = "full", prevent_cse: bool = True):
    """Returns `fn` with its residuals chosen by a plan; values and gradients stay the same.

    Python values among the arguments (`True`, `"gelu"`, a function) stay Python values, by position
    and by keyword. Arrays that `fn` closes over get gradients.

    Args:
      fn: A pure function of pytrees, which returns any pytree of arrays.
      remat: `none`, `full`, or policies such as `"dots"`, `"names:q,k"`, `"attention"` or
        `"full+offload:carry"`; or a plan of the function's graph, from `jaxckpt.fit`; or a policy
        of `jax.checkpoint`.
      prevent_cse: As in `jax.checkpoint`; False inside a loop.

    Returns:
      A function of the same arguments.

    Raises:
      PlanError: The plan is for several blocks. When the returned function is called: a name of the
        plan matches nothing in `fn`, `fn` has an effect that must happen once, or the plan is for
        another function's graph.
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
    return checkpointed(fn, plan, given, prevent_cse)


def _is_none(plan: Plan) -> bool:
    return not plan.graph and plan.stages[0].schedule == "none"


def remat_of(
    block: type,
    plan: str | Plan | Callable,
    *,
    methods: Sequence[str] = ("__call__",),
    prevent_cse: bool = True,
):
    """A context in which each call of a class is checkpointed, wherever its code is.

    For a model of an installed package, whose code you do not edit. Methods of the class are
    replaced while the context is open, in all threads. A call inside another call of the class is
    not wrapped again. Enter the context inside a function under `jax.jit`, or around a call of it.

    Args:
      block: A class whose objects are pytrees, such as an Equinox module. For Flax modules use
        `jaxckpt.linen.remat_of` and `jaxckpt.nnx.remat_of`.
      plan: `none`, `full`, or policies such as `"dots"`; or a policy of `jax.checkpoint`.
      methods: Names of the methods that are checkpointed.
      prevent_cse: As in `jax.checkpoint`; False inside a loop.

    Raises:
      PlanError: The plan is for several blocks. At a call: a name of the plan matches nothing in
        the block.
      ValueError: `block` is no class, the class has no such method, or no method was called.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, jaxckpt
      >>> mlp, x = eqx.nn.MLP(8, 8, 16, depth=3, key=jax.random.key(0)), jnp.ones(8)
      >>> def loss(mlp):
      ...     with jaxckpt.remat_of(eqx.nn.MLP, "full"):
      ...         return mlp(x).sum()
      >>> len(eqx.filter_grad(loss)(mlp).layers)
      4
    """
    bound, given = plan_of_one(plan, "remat_of wraps one", "run and chain take every plan")
    wrap = lambda fn: checkpointed(fn, bound, given, prevent_cse)
    return replaced(block, methods, wrap, bound, given, "remat_of")


# The classes, plans and methods that were called under a context. A step under `jax.jit` calls its
# modules only when it is traced, so that later calls of the step need this record.
_WRAPPED: set[Hashable] = set()


@contextlib.contextmanager
def told_once(block: type, methods: Sequence[str], plan, taker: str, seen: Callable[[], str]):
    """A context that ends in an error if no call of a class was wrapped.

    It yields a function to be called at each wrapped call.

    Args:
      block: The class.
      methods: Names of the methods that are wrapped.
      plan: The plan, or the user's policy.
      taker: The name of the user's call, for errors.
      seen: Returns a clause for the error about the classes that were called; `""` if unknown.

    Raises:
      ValueError: `block` has no such method, or no method was called.
    """
    for name in methods:
        if not callable(getattr(block, name, None)):
            raise ValueError(f"{block.__name__} has no method {name!r}")
    key, found = (block, str(plan), tuple(methods)), []
    # The metadata is part of the key of JAX's caches: a function that was traced outside the
    # context is traced again inside it.
    with set_xla_metadata(jaxckpt_remat_of=repr(key)):
        yield lambda: found.append(_WRAPPED.add(key))
    others = seen()
    if not found and (others or key not in _WRAPPED):
        raise ValueError(
            f"no {block.__name__} was called under {taker}, so nothing is checkpointed{others}"
        )


@contextlib.contextmanager
def replaced(
    block: type, methods: Sequence[str], wrap: Callable, plan: Plan, given, taker: str
) -> Iterator[None]:
    """A context in which methods of a class are replaced by `wrap(method)`.

    Raises:
      ValueError: See `told_once`.
    """
    if not inspect.isclass(block):
        raise ValueError(f"{taker} takes a class, not {shown(block)}")
    inside = []

    def replacement(method: Callable) -> Callable:
        def inner(*args, **named):
            inside.append(method)
            try:
                return method(*args, **named)
            finally:
                inside.pop()

        wrapped = functools.wraps(method)(wrap(inner))

        @functools.wraps(method)
        def call(*args, **named):
            tell()
            is_plain = inside or _is_none(plan)
            return (method if is_plain else wrapped)(*args, **named)

        return call

    with told_once(block, methods, given or plan, taker, lambda: "") as tell:
        before = {name: vars(block).get(name) for name in methods}
        try:
            for name in methods:
                setattr(block, name, replacement(getattr(block, name)))
            yield
        finally:
            for name, method in before.items():
                if method is None:
                    delattr(block, name)
                else:
                    setattr(block, name, method)


def plan_of_one(remat, taker: str, others: str) -> tuple[Plan, GivenPolicy | None]:
    """Returns the plan of one block, and the user's own policy if there is one.

    Args:
      remat: The user's plan, its text, or a policy.
      taker: A clause for the error, which names the function that takes one block.
      others: A clause for the error, which names functions that take every plan.

    Raises:
      PlanError: The plan speaks of several blocks.
    """
    plan, given = plan_and_policy(remat)
    if plan.graph:
        return plan, given
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
    """Returns `fn` under a plan, which is traced and checked at each call; `none` only calls it."""

    @functools.wraps(fn)
    def region(*args, **named):
        if _is_none(plan) and not observers.is_observed():
            return fn(*args, **named)
        arrays, merge = apart((args, named))

        def call(arrays, _):
            args, named = merge(arrays)
            return fn(*args, **named)

        arrays = as_arrays(arrays)
        traced, consts = trace_block(call, arrays, ())
        leaves = [*arrays, *consts]
        told = StackCall(
            block=dataclasses.replace(traced, counts=(len(leaves), 0, 0)),
            params=[],
            carry=leaves,
            remat=given or plan,
            num_blocks=1,
            unroll=1,
            is_region=True,
        )
        made = run_region(traced, plan, observers.tell(told), given, prevent_cse)
        return jax.tree.unflatten(traced.out_tree, made)

    return region


def run_region(
    block: TracedBlock,
    plan: Plan,
    leaves: Sequence,
    given: GivenPolicy | None = None,
    prevent_cse: bool = True,
) -> list:
    """Returns the leaves of a function's result under a plan of one function.

    Args:
      block: The function, a block without parameters.
      plan: `none`, `full` with policies, or a plan of the function's graph.
      leaves: The leaves of the function's carry, then the leaves of its consts.
      given: The user's own policy, which replaces the plan's policies.
      prevent_cse: As in `jax.checkpoint`.
    """
    if plan.graph:
        return _run_graph(block, plan, leaves, prevent_cse)
    if _is_none(plan):
        return core.jaxpr_as_fun(block.jaxpr)(*leaves)
    return _run_one(block, plan, given, leaves, prevent_cse)


def _run_one(
    block: TracedBlock,
    plan: Plan,
    given: GivenPolicy | None,
    leaves: Sequence,
    prevent_cse: bool,
) -> list:
    """Returns the leaves of a block's result; the block is one `jax.checkpoint`."""
    check_rerun(block, plan, given)
    check_policies(plan, lambda asked: value_names.offered(block.call, asked, *block.inputs))
    policies = plan.stages[0].policies
    call = value_names.resolved(block.call, policies)
    checkpoint = Remat(policies=policies, given=given)
    run = checkpoint(lambda carry, consts: call(carry, [], consts), prevent_cse=prevent_cse)
    return run(leaves[: block.counts[0]], leaves[block.counts[0] :])


def _run_graph(block: TracedBlock, plan: Plan, leaves: Sequence, prevent_cse: bool) -> list:
    """Returns the leaves of a block's result; the plan's segments run one after another."""
    opened = Opened.of(block.jaxpr)
    plan = plan.bind_graph(opened.graph, opened.num_steps)
    segments, calls = opened.segments(plan), []
    for place, (segment, stage) in enumerate(zip(segments, plan.stages, strict=True)):
        own = Plan(stages=(dataclasses.replace(stage, count=None),))
        if stage.schedule == "none":
            call = core.jaxpr_as_fun(segment.block.jaxpr)
            calls.append(lambda values, call=call: call(*values))
            continue
        run = functools.partial(_run_one, segment.block, own, None, prevent_cse=prevent_cse)
        calls.append(functools.partial(_explained, run, place, plan))
    return opened.run(segments, calls, leaves)


def _explained(run: Callable, place: int, plan: Plan, values: Sequence) -> list:
    """Returns the outputs of a segment; a `PlanError` also names the plan and the segment."""
    try:
        return run(values)
    except PlanError as error:
        raise PlanError(f"plan {str(plan)!r}, segment {place + 1}: {error}") from None
