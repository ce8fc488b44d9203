"""Flax Linen adapters: a module class in, a rematerialized stack or class out.

    x = jaxckpt.linen.Stack(Block, num_blocks=28, remat="sqrt", name="layers")(x)

    for _ in range(28):                                      # or in a loop of your own
        x = jaxckpt.linen.remat(Block, "attention")()(x)

The parameter tree does not depend on the plan, so a checkpoint written under one plan loads under
any other. Blocks with state beside parameters (batch statistics, caches) are refused.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import DenyList, Scope, lift
from flax.core.scope import intersect_filters
from flax.linen.transforms import lift_transform

from jaxckpt.plans import Plan, PlanError
from jaxckpt.transforms import policies, rows
from jaxckpt.transforms.arguments import apart, check_class, part, put
from jaxckpt.transforms.region import checkpointed, plan_of_one
from jaxckpt.transforms.scan import scan

_PARAMS = "params"

# Advice on state, by its collection.
_CURES = {
    "batch_stats": "use a layer without state (LayerNorm or GroupNorm instead of BatchNorm)",
    "cache": "decode with a loop over blocks, which needs no gradients and so no checkpointing",
    "intermediates": "return what is sown beside the carry (out=0 has it stacked), or leave "
    "'intermediates' out of mutable=",
}


class Stack(nn.Module):
    """L equal Linen blocks under a plan; their parameters are stacked `[L, ...]` in one tree.

    The block's own parameter names follow this module's name directly: block `i` of
    `params["layers"]["mlp"]["kernel"]` is its row `i`. Every random stream that `apply` is given
    (`rngs={"dropout": key}`) is split into one key per block.

    Attributes:
      block: A Linen module class, or a `functools.partial` of one, called with `parent=None`.
      num_blocks: The number of blocks, L.
      remat: A plan or its text, or a policy of `jax.checkpoint`.
      unroll: Blocks unrolled in one trip of a loop.
      dtype: Casts floating parameters to the dtype that blocks compute in, once before a loop.
        Otherwise each block casts its own, in the forward pass, in recomputation and in the
        backward pass. Unrolled checkpointed blocks still cast their own, which takes a little
        longer but needs no copy of all parameters. None casts nothing.
      out: The place of the carry in a block's result: an index, a key, or a function. The rest of a
        tuple or dict, such as hidden states or a router's loss, comes back stacked, `[L, ...]`.
        None if the result is the carry.

    Example:
      >>> import flax.linen as nn, functools, jax, jax.numpy as jnp, jaxckpt
      >>> block = functools.partial(nn.Dense, 8)
      >>> stack, x = jaxckpt.linen.Stack(block, num_blocks=12, remat="log"), jnp.ones([4, 8])
      >>> params = stack.init(jax.random.key(0), x)
      >>> grads = jax.grad(lambda params: stack.apply(params, x).sum())(params)
      >>> grads["params"]["kernel"].shape
      (12, 8, 8)
    """

    block: Callable[..., nn.Module]
    num_blocks: int
    remat: str | Plan | Callable = "full"
    unroll: int = 1
    dtype: Any = None
    out: int | str | Callable | None = None

    def __post_init__(self):
        check_class(self.block, nn.Module, "linen.Stack")
        if isinstance(self.num_blocks, bool) or not isinstance(self.num_blocks, int):
            raise PlanError(f"num_blocks is a whole number of blocks, not {self.num_blocks!r}")
        super().__post_init__()

    @nn.compact
    def __call__(self, carry, *consts, **named):
        """Runs the blocks one after another.

        Args:
          carry: The first block's input, any pytree of arrays; `block(carry, *consts, **named)`
            returns a carry of the same structure, shapes and dtypes.
          *consts: Handed to every block. Arrays get gradients; Python values, such as `True`, stay
            Python values.
          **named: Keyword arguments for every block, such as `deterministic=True`.

        Returns:
          The last block's carry; with `out`, the result of a block, its rest stacked.

        Raises:
          PlanError: The plan does not parse, does not fit L blocks, or names what no block has.
          ValueError: A block has state beside its parameters, sows values that the caller asks for,
            holds a module from outside the stack, or changes its carry.
        """
        block = self.block(parent=None)
        _check_unshared(block, consts, named)
        scope = _scope(self)
        # `make_rng` takes the stream `params` for a stream that the caller gave no key for.
        keys = {name: jax.random.split(self.make_rng(name), self.num_blocks) for name in scope.rngs}
        arrays, merge = apart((consts, named))
        if self.is_initializing():
            self._init_params(lambda keys: block.init(keys, carry, *consts, **named), keys)

        cast = functools.partial(in_dtype, dtype=self.dtype)
        params = nn.meta.unbox(dict(self.variables.get(_PARAMS, {})))
        if not rows.reads_inside(self.remat, self.unroll):
            params, cast = cast(params), lambda params: params
        mutable = intersect_filters(scope.mutable, DenyList(_PARAMS))

        def apply(carry, block_i):
            # `bind`, not `apply`, so that a caller's capture_intermediates reaches the block.
            variables = {_PARAMS: cast(block_i["params"])}
            bound = block.bind(variables, rngs=block_i["keys"], mutable=mutable)
            consts, named = merge(arrays)
            result = bound(carry, *consts, **named)
            _check_state(bound.variables)
            return part(result, self.out)

        # The index gives a length to blocks that have neither parameters nor keys.
        blocks = {"params": params, "keys": keys, "index": jnp.arange(self.num_blocks)}
        made = scan(apply, carry, blocks, remat=self.remat, unroll=self.unroll)
        return put(*made, self.out)

    def _init_params(self, init: Callable, keys: dict[str, jax.Array]):
        """Draws each block's parameters from its own keys and stores them stacked."""

        def init_one(keys):
            variables = init(keys)
            _check_state(variables)
            return variables.get(_PARAMS, {})

        stacked = jax.vmap(init_one)(keys)
        stacked = nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "blocks"})
        for name, value in stacked.items():
            self.put_variable(_PARAMS, name, value)


def _check_unshared(block: nn.Module, consts, named):
    """Raises `ValueError` if blocks would share a module from outside their stack."""
    for where, module in _modules_of(block, consts, named):
        if module.parent is not None:
            raise ValueError(
                f"{where} is the module {module.name!r} of the model around the stack, whose "
                "parameters the blocks would not share; call it outside and hand its output over, "
                "or make it with parent=None for one of its own in every block"
            )


def _modules_of(block: nn.Module, consts, named) -> Iterator[tuple[str, nn.Module]]:
    """Yields `(where, module)` for each module in a block's fields and its call's arguments."""
    given = [(f"the block's {name}", value) for name, value in _fields(block)]
    given += [("an argument of the stack", value) for value in (*consts, *named.values())]
    while given:
        where, tree = given.pop()
        for leaf in jax.tree.leaves(tree):
            if isinstance(leaf, nn.Module):
                yield where, leaf
                given += [(f"{where}.{name}", value) for name, value in _fields(leaf)]


def _fields(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(module):
        if field.init and field.name not in ("parent", "name"):
            yield field.name, getattr(module, field.name)


def _check_state(variables):
    """Raises `ValueError` if a block has variables beside its parameters."""
    state = {name: kept for name, kept in variables.items() if name != _PARAMS and kept}
    if not state:
        return
    paths = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    if len(paths) > 3:
        paths[3:] = [f"{len(paths) - 3} more"]
    cures = dict.fromkeys(_CURES.get(name, "put it into the carry") for name in state)
    raise ValueError(
        f"the block keeps state in {', '.join(paths)}, which a stack of checkpointed blocks does "
        f"not carry; {'; '.join(cures)}"
    )


def in_dtype(params, dtype):
    """Returns parameters with floating leaves cast to a dtype; unchanged if it is None."""
    if dtype is None:
        return params
    is_floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if is_floating(x) else x, params)


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
      static_argnums: Positions of arguments that are not traced even if they are arrays; `self` is
        0.
      prevent_cse: As in `jax.checkpoint`; False inside a loop.

    Returns:
      The class, or a `functools.partial` of it.

    Raises:
      PlanError: The plan is for several blocks (use `Stack`); or, when the module is called, a name
        matches nothing in the block.
      ValueError: `block` is a module rather than its class.

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
    plan, given = plan_of_one(plan, "linen.remat wraps one", "linen.Stack takes every plan")
    stage = plan.stages[0]
    if stage.offloads_carry:
        raise PlanError("offload:carry needs the blocks' inputs; linen.Stack takes it")
    if stage.schedule == "none":
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


def _checkpoint(
    fn: Callable,
    *,
    plan: Plan,
    given: policies.GivenPolicy | None,
    prevent_cse: bool,
    static: set[int],
) -> Callable:
    """Returns `fn(scopes, *args, **named)` under `jax.checkpoint`, a lifted transform of Flax.

    Flax passes the scopes of the module that is called, and of the modules that it shares with
    others, so the tags are those of this call.
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


def _scope(module: nn.Module) -> Scope:
    assert module.scope is not None  # a module that is called is bound
    return module.scope
