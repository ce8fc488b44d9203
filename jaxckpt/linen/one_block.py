"""One Linen block under `jax.checkpoint`: `remat` wraps its class, `remat_of` wraps its calls.

    for _ in range(28):                                      # in a loop of your own
        x = jaxckpt.linen.remat(Block, "attention")()(x)

    with jaxckpt.linen.remat_of(Block, "dots"):              # a model whose code you do not edit
        x = model.apply(variables, x)

A plan for one block is `none`, `full` or policies. Parameters keep their names.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flax import linen as nn
from flax.core import lift
from flax.linen.transforms import lift_direct_transform, lift_transform

from jaxckpt.plans import Plan, PlanError
from jaxckpt.plans.errors import nearest, shown
from jaxckpt.transforms import policies
from jaxckpt.transforms.arguments import apart, check_class
from jaxckpt.transforms.region import checkpointed, plan_of_one, told_once


def remat(
    block: Any,
    plan: str | Plan | Callable,
    *,
    methods: Sequence[str] | None = None,
    static_argnums: int | Sequence[int] = (),
    prevent_cse: bool = True,
) -> Any:
    """Makes a Linen module class whose call is checkpointed, as `flax.linen.remat` does.

    The class has the name of `block`, so a model's parameter tree does not change. Python values
    among the arguments (`True`, `"gelu"`) stay Python values, by position and by keyword.

    Args:
      block: A Linen module class with a `__call__`, or a `functools.partial` of one.
      plan: A plan for one block: `none`, `full` or policies, such as `"attention"`. Or a policy of
        `jax.checkpoint`.
      methods: Names of the methods that are checkpointed; by default only `__call__`.
      static_argnums: Positions of arguments that are never traced, not even if they are arrays;
        `self` is position 0.
      prevent_cse: As in `jax.checkpoint`; False inside a loop.

    Returns:
      The class, or a `functools.partial` of it.

    Raises:
      PlanError: The plan is for several blocks (use `Stack`). When the module is called: a name of
        the plan matches nothing in the block.
      ValueError: `block` is a module instead of a class.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxckpt
      >>> dense, x = jaxckpt.linen.remat(nn.Dense, "full")(8), jnp.ones([4, 8])
      >>> params = dense.init(jax.random.key(0), x)
      >>> jax.grad(lambda params: dense.apply(params, x).sum())(params)["params"]["kernel"].shape
      (8, 8)
    """
    check_class(block, nn.Module, "linen.remat")
    if isinstance(block, functools.partial):
        made = remat(
            block.func,
            plan,
            methods=methods,
            static_argnums=static_argnums,
            prevent_cse=prevent_cse,
        )
        return functools.partial(made, *block.args, **block.keywords)
    if not (inspect.isclass(block) and issubclass(block, nn.Module)):
        raise ValueError(f"linen.remat takes a Linen module class, not {block!r}")
    plan, given = _plan_of_one(plan, "linen.remat wraps one")
    if plan.stages[0].schedule == "none" and not plan.graph:
        return block
    static = [static_argnums] if isinstance(static_argnums, int) else static_argnums
    made: Any = lift_transform(
        _checkpoint,
        block,
        plan=plan,
        given=given,
        prevent_cse=prevent_cse,
        static={number - 1 for number in static},
        methods=methods,
    )
    made.__name__, made.__qualname__ = block.__name__, block.__qualname__
    made.__doc__ = block.__doc__
    return made


def _plan_of_one(plan, taker: str) -> tuple[Plan, policies.GivenPolicy | None]:
    plan, given = plan_of_one(plan, taker, "linen.Stack takes every plan")
    if plan.stages[0].offloads_carry:
        raise PlanError("offload:carry needs the blocks' inputs; linen.Stack takes it")
    return plan, given


@contextlib.contextmanager
def remat_of(
    block: type[nn.Module],
    plan: str | Plan | Callable,
    *,
    methods: Sequence[str] = ("__call__",),
    prevent_cse: bool = True,
) -> Iterator[None]:
    """A context in which each call of a module class is checkpointed, wherever its code is.

    For a model of an installed package, whose code you do not edit. Parameters keep their names. A
    call inside another call of the class is not wrapped again. Enter the context inside a function
    under `jax.jit`, or around a call of it.

    Args:
      block: The class; calls of its subclasses are checkpointed too.
      plan: A plan for one block: `none`, `full` or policies, such as `"dots"`. Or a policy of
        `jax.checkpoint`.
      methods: Names of the methods that are checkpointed.
      prevent_cse: As in `jax.checkpoint`; False inside a loop.

    Raises:
      PlanError: The plan is for several blocks. At a call: a name of the plan matches nothing in
        the block.
      ValueError: `block` is no class of Linen modules, the class has no such method, or no module
        of the class was called.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxckpt
      >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8)]), jnp.ones([4, 8])
      >>> params = model.init(jax.random.key(0), x)
      >>> def loss(params):
      ...     with jaxckpt.linen.remat_of(nn.Dense, "full"):
      ...         return model.apply(params, x).sum()
      >>> jax.grad(loss)(params)["params"]["layers_0"]["kernel"].shape
      (8, 8)
    """
    if not (inspect.isclass(block) and issubclass(block, nn.Module)):
        raise ValueError(f"linen.remat_of takes a Linen module class, not {shown(block)}")
    plan, given = _plan_of_one(plan, "linen.remat_of wraps one")
    inside, called = [], {}

    def intercept(next_fun, args, named, context):
        module, method = context.module, context.method_name
        called[type(module).__name__] = None
        if not isinstance(module, block) or method not in methods or inside:
            return next_fun(*args, **named)
        tell()
        if plan.stages[0].schedule == "none" and not plan.graph:
            return next_fun(*args, **named)

        def call(module, *args, **named):
            inside.append(module)
            try:
                return getattr(module, method)(*args, **named)
            finally:
                inside.pop()

        options = {"plan": plan, "given": given, "prevent_cse": prevent_cse, "static": set()}
        wrap = functools.partial(_checkpoint, **options)
        run = lambda fn, scopes, *args, **named: wrap(fn)(scopes, *args, **named)
        return lift_direct_transform(run, (call,), module, *args, **named)

    def seen() -> str:
        return f"; called were {', '.join(called)}{nearest(block.__name__, called)}" * bool(called)

    with (
        told_once(block, methods, given or plan, "linen.remat_of", seen) as tell,
        nn.intercept_methods(intercept),
    ):
        yield


def _checkpoint(
    fn: Callable,
    *,
    plan: Plan,
    given: policies.GivenPolicy | None,
    prevent_cse: bool,
    static: set[int],
) -> Callable:
    """Returns `fn(scopes, *args, **named)` under `jax.checkpoint`, a lifted transform of Flax.

    Flax passes the scopes of the called module, and of the modules that it shares with others. The
    tags are therefore the tags of this call.
    """

    def call(scopes, *args, **named):
        dynamic = [None if at in static else arg for at, arg in enumerate(args)]
        arrays, merge = apart((dynamic, named))

        def inner(scopes_of, repack, variables, rngs, *arrays):
            def pure(variables, rngs, *arrays):
                scopes = scopes_of(variables, rngs)
                dynamic, named = merge(arrays)
                given = [args[at] if at in static else arg for at, arg in enumerate(dynamic)]
                return fn(scopes, *given, **named), repack(scopes)

            return checkpointed(pure, plan, given, prevent_cse)(variables, rngs, *arrays)

        return lift.pack(inner, (True,), (True,), (True,), name="remat")(scopes, *arrays)

    return call
