"""Flax Linen adapters: a module class in, a rematerialized stack or class out; a list as it is.

    x = jaxckpt.linen.Stack(Block, num_blocks=28, remat="sqrt", name="layers")(x)

    for _ in range(28):                                      # or in a loop of your own
        x = jaxckpt.linen.remat(Block, "attention")()(x)

    x = jaxckpt.linen.run(self.blocks, x, mask, remat="sqrt")  # a list that setup() made

    with jaxckpt.linen.remat_of(Block, "dots"):              # a model whose code stays as it is
        x = model.apply(variables, x)

The parameter tree does not depend on the plan, so a checkpoint written under one plan loads under
any other. A stack refuses blocks that change state beside their parameters (batch statistics, sown
values), unless `carry=` names its collection; a list keeps what it has.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import DenyList, Scope, lift
from flax.core.scope import intersect_filters
from flax.linen.transforms import lift_direct_transform, lift_transform
from jax.extend import core

from jaxckpt.plans import Plan, PlanError
from jaxckpt.plans.errors import nearest, shown
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms import policies, programs, rows
from jaxckpt.transforms.arguments import apart, check_class, part, put
from jaxckpt.transforms.checks import check_carry
from jaxckpt.transforms.layers import (
    KINDS,
    attributes_of,
    check_layers,
    differences,
    grouped,
    in_order,
    run_rows,
    single,
    stacked,
)
from jaxckpt.transforms.region import checkpointed, plan_of_one, told_once
from jaxckpt.transforms.scan import scan
from jaxckpt.transforms.stack_update import is_attached
from jaxckpt.transforms.traced_block import first_block

_PARAMS = "params"

# Advice on state, by its collection.
_CURES = {
    "batch_stats": "give the stack carry=('batch_stats',), or use a layer without state (LayerNorm "
    "or GroupNorm)",
    "cache": "decode with a loop over blocks, which needs no gradients and so no checkpointing",
    "intermediates": "give the stack carry=('intermediates',), return what is sown beside the "
    "carry (out=0 has it stacked), or leave 'intermediates' out of mutable=",
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
      carry: Collections of variables that blocks may change, such as `("batch_stats",)`, or what
        they sow, `("intermediates",)`. Every block has a row of its own, `[L, ...]`, and changes it
        once, however often it is run again.

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
    carry: str | Sequence[str] = ()

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
            returns a carry with this structure, these shapes and these dtypes.
          *consts: Handed to every block. Arrays get gradients; Python values, such as `True`, stay
            Python values.
          **named: Keyword arguments for every block, such as `deterministic=True`.

        Returns:
          The last block's carry; with `out`, the result of a block, its rest stacked.

        Raises:
          PlanError: The plan does not parse, does not fit L blocks, or names what no block has.
          ValueError: A block changes state that `self.carry` does not name, sows values that the
            caller asks for, holds a module from outside the stack, or changes its carry.
        """
        block = self.block(parent=None)
        _check_unshared(block, consts, named)
        scope = _scope(self)
        # `make_rng` takes the stream `params` for a stream that the caller gave no key for.
        keys = {name: jax.random.split(self.make_rng(name), self.num_blocks) for name in scope.rngs}
        arrays, merge = apart((consts, named))
        kept = (self.carry,) if isinstance(self.carry, str) else tuple(self.carry)
        if self.is_initializing():
            self._init_rows(block, kept, keys, carry, *consts, **named)

        cast = functools.partial(in_dtype, dtype=self.dtype)
        state = nn.meta.unbox({name: dict(one) for name, one in self.variables.items() if one})
        params = state.pop(_PARAMS, {})
        # What is updated in the backward pass is handed over as it is; a copy could not be.
        if not rows.reads_inside(self.remat, self.unroll) and not is_attached(params):
            params, cast = cast(params), lambda params: params
        mutable = intersect_filters(scope.mutable, DenyList(_PARAMS))

        def apply(carry, block_i):
            # `bind`, not `apply`, so that a caller's capture_intermediates reaches the block.
            variables = {_PARAMS: cast(block_i["params"]), **block_i["state"]}
            bound = block.bind(variables, rngs=block_i["keys"], mutable=mutable)
            consts, named = merge(arrays)
            carry, rest = part(bound(carry, *consts, **named), self.out)
            after = {name: bound.variables[name] for name in bound.variables if name != _PARAMS}
            return carry, (rest, _kept(block_i["state"], after, kept))

        # The index gives a length to blocks that have neither parameters nor keys.
        index = jnp.arange(self.num_blocks)
        blocks = {"params": params, "state": state, "keys": keys, "index": index}
        options = {"remat": self.remat, "unroll": self.unroll}
        carry, (rest, changed) = scan(apply, carry, blocks, **options)
        for name, values in changed.items():
            self._put(name, values)
        return put(carry, rest, self.out)

    def _init_rows(self, block: nn.Module, kept: Sequence[str], keys, *args, **named):
        """Draws each block's variables from its own keys and stores them stacked."""

        def init_one(keys):
            variables = block.init(keys, *args, **named)
            state = {name: one for name, one in variables.items() if name != _PARAMS and one}
            if not state.keys() <= set(kept):
                _, after = block.apply(variables, *args, rngs=keys, mutable=list(state), **named)
                _kept(state, after, kept)
            return variables

        stacked = jax.vmap(init_one)(keys)
        for name, values in stacked.items():
            self._put(name, nn.meta.add_axis(values, 0, {nn.PARTITION_NAME: "blocks"}))

    def _put(self, collection: str, values: Mapping):
        for name, value in values.items():
            self.put_variable(collection, name, value)


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


def _kept(before, after, kept: Sequence[str]) -> dict:
    """Returns the collections that a block changed, of those that its stack keeps.

    Args:
      before: The block's variables beside its parameters.
      after: The same after its call.
      kept: Names of collections.

    Raises:
      ValueError: The block changed a variable of another collection.
    """
    given = dict(jax.tree_util.tree_leaves_with_path(before))
    found = jax.tree_util.tree_leaves_with_path(after)
    changed = [path for path, leaf in found if leaf is not given.get(path)]
    names = dict.fromkeys(path[0].key for path in changed)
    refused = [name for name in names if name not in kept]
    if not refused:
        return {name: after[name] for name in names}
    paths = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path in changed
        if path[0].key in refused
    ]
    if len(paths) > 3:
        paths[3:] = [f"{len(paths) - 3} more"]
    cures = dict.fromkeys(_CURES.get(name, f"give the stack carry=({name!r},)") for name in refused)
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

    For a model of an installed package: nothing of it is edited or copied, and parameters keep
    their names. A call inside of another call of the class is not wrapped again. A function under
    `jax.jit` keeps what it was traced with; write the context inside of it or around it.

    Args:
      block: The class; calls of its subclasses are checkpointed too.
      plan: A plan for one block: `none`, `full` or policies, such as `"dots"`. Or a policy of
        `jax.checkpoint`.
      methods: Names of the methods that are checkpointed.
      prevent_cse: As in `jax.checkpoint`; False inside a loop.

    Raises:
      PlanError: The plan is for several blocks; or, at a call, a name matches nothing in the block.
      ValueError: `block` is no class of Linen modules, it has no such method, or no module of the
        class was called.

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


def run(
    layers: Sequence[nn.Module],
    carry,
    *args,
    out: int | str | Callable | None = None,
    each: Mapping[str, Any] | None = None,
    remat: str | Plan | Schedule | Callable = "sqrt",
    unroll: int = 1,
    **named,
):
    """Runs a list of Linen modules as it is, checkpointed by a plan that counts them.

    The list is one that `setup()` made, and the parameter tree stays a list's (`blocks_0`,
    `blocks_1`, ...). Random streams are the list's own too: every layer draws the dropout masks
    that it draws in a Python loop. What the layers sow, and batch statistics, come back once.

    Args:
      layers: Bound modules, of one kind or of several with at least two layers of each. Within a
        kind they may differ in numbers, such as a rate, and in nothing else that they compute with.
        Each is traced once, as in a loop; one of each kind is compiled.
      carry: The first layer's input; `layer(carry, *args, **named, **each_i)` returns its like, or
        has it where `out` says.
      *args: Handed to every layer. Arrays get gradients; Python values, such as `True`, and None
        stay what they are.
      out, each, remat, unroll: As for `jaxckpt.run`.
      **named: As `args`, by keyword, such as `deterministic=True`.

    Returns:
      The last layer's carry; with `out`, what a layer returns, its rest stacked.

    Raises:
      PlanError: As `jaxckpt.scan_blocks`.
      ValueError: No layers, modules that are not bound, layers that differ (what differs is named),
        an `out` that is not there, or a layer that changes its carry.
    """
    layers, each = check_layers(layers, each, "linen.run takes a list of Linen modules first, then")
    for place, layer in enumerate(layers):
        if not isinstance(layer, nn.Module):
            raise ValueError(
                f"linen.run takes Linen modules, and layers[{place}] is {shown(layer)}; "
                "jaxckpt.run takes pytrees and jaxckpt.nnx.run takes NNX modules"
            )
        if layer.scope is None:
            raise ValueError(
                f"layers[{place}] is not bound; call linen.run in a method of the module whose "
                "setup() made the list"
            )
    if layers[0].is_initializing():
        rests = []
        for i, layer in enumerate(layers):
            each_i = jax.tree.map(lambda x, i=i: x[i], each)
            carry, rest = part(layer(carry, *args, **named, **each_i), out)
            rests.append(rest)
        return put(carry, stacked(rests), out)

    traced = [_trace(layer, out, carry, first_block(each), args, named) for layer in layers]
    order = _kinds_of(layers, [one.program for one in traced])
    # One array for all layers, so that it is not stacked.
    arrays, _ = apart((args, named))

    def step_of(program: core.ClosedJaxpr, made) -> Callable:
        check_carry(carry, made[0])
        call, tree = core.jaxpr_as_fun(program), jax.tree.structure(made)

        def step(carry, row, each_i):
            inputs, numbers = row
            flat = call(*inputs, *jax.tree.leaves((carry, each_i)), *arrays, *numbers)
            carry, rest, changed = jax.tree.unflatten(tree, flat)
            return carry, (rest, changed)

        return step

    steps: list[Callable] = []
    inputs: list[Any] = [None] * len(layers)
    for kind in range(max(order) + 1):
        mine = {i: one for i, one in enumerate(traced) if order[i] == kind}
        program, numbers = programs.one_program([one.program for one in mine.values()])
        steps.append(step_of(program, next(iter(mine.values())).made))
        for (i, one), row in zip(mine.items(), numbers, strict=True):
            inputs[i] = (one.inputs, row)
    has_rest = out is not None
    carry, ys = run_rows(
        steps, carry, inputs, each, order, has_rest=has_rest, remat=remat, unroll=unroll
    )
    for i, one in enumerate(traced):
        kind = order[i]
        if changed := ys[kind][1]:
            one.publish([leaf[order[:i].count(kind)] for leaf in changed])
    return put(carry, in_order([rest for rest, _ in ys], order), out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layer:
    """A bound module that was traced once.

    Attributes:
      program: From `inputs`, the carry, `each_i` and the call's arrays to the leaves of `made`.
      inputs: The leaves of the module's variables and keys.
      made: The carry, the rest of the result and the variables that changed, abstract.
      publish: Stores those variables in the module's scope.
    """

    program: core.ClosedJaxpr
    inputs: list
    made: Any
    publish: Callable[[list], None]


def _trace(layer: nn.Module, out, carry, each_i, args, named) -> _Layer:
    """Returns a bound module, traced as a function of its variables and keys."""
    found = []

    def record(fn, scopes, carry, each_i, args, named):
        arrays, merge = apart((args, named))

        def inner(scopes_of, repack, variables, rngs):
            kept = []

            def pure(variables, rngs, carry, each_i, arrays):
                inside = scopes_of(variables, rngs)
                args, named = merge(arrays)
                carry, rest = part(fn(inside, carry, *args, **named, **each_i), out)
                with_changed, changed = _changed(variables, repack(inside))
                kept.append(with_changed)
                return carry, rest, changed

            trace = jax.make_jaxpr(pure, return_shape=True)
            program, made = trace(variables, rngs, carry, each_i, arrays)

            def publish(changed: list):
                state = kept[-1](variables, changed)
                lift.pack(lambda *_: (None, state), (True,), (True,), (True,))(scopes)

            inputs = jax.tree.leaves((variables, rngs))
            found.append(_Layer(program=program, inputs=inputs, made=made, publish=publish))
            return None, ()

        return lift.pack(inner, (True,), (True,), (True,), name="run")(scopes)

    def call_layer(layer, carry, *args, **named):
        return layer(carry, *args, **named)

    lift_direct_transform(record, (call_layer,), layer, carry, each_i, args, named)
    return found[0]


def _changed(before, after) -> tuple[Callable, list]:
    """Returns the leaves of a module's variables that a call changed or made.

    Args:
      before: The variables.
      after: Those that may be written, after the call.

    Returns:
      A function that returns `after` with other leaves, from other variables and what changed of
      them; and the leaves that changed.
    """
    given = dict(jax.tree_util.tree_leaves_with_path(before))
    paths, tree = jax.tree_util.tree_flatten_with_path(after)
    same = [leaf is given.get(path) for path, leaf in paths]

    def with_changed(before, changed: list):
        given, made = dict(jax.tree_util.tree_leaves_with_path(before)), iter(changed)
        pairs = zip(same, paths, strict=True)
        return jax.tree.unflatten(
            tree, [given[path] if kept else next(made) for kept, (path, _) in pairs]
        )

    changed = [leaf for kept, (_, leaf) in zip(same, paths, strict=True) if not kept]
    return with_changed, changed


def _kinds_of(layers: list, traced: list[core.ClosedJaxpr]) -> tuple[int, ...]:
    """Returns the kind of each layer; layers of a kind compute the same but for numbers.

    Raises:
      ValueError: A kind has one layer only, and there are others; what differs is named.
    """
    computed = [programs.without_numbers(program) for program in traced]
    order = grouped(len(layers), lambda i, k: computed[i] == computed[k])
    place = single(order)
    if place is None:
        return order
    place = place or 1
    pair = [layers[0]] * place + [layers[place]]
    found = [text for text, _ in differences(pair, _attributes, place)]
    raise ValueError(
        f"{'; '.join(found[:3]) or f'layers[0] and layers[{place}] compute differently'}; linen."
        f"{KINDS}, which may differ in numbers (random draws, a rate) outside of what nn.remat, "
        "nn.scan and nn.jit do inside a layer"
    )


def _attributes(value) -> dict | None:
    """Returns what two equal layers have in common: a module's fields and variables."""
    if isinstance(value, nn.Module):
        variables = {} if value.scope is None else {"variables": value.variables}
        return dict(_fields(value)) | variables
    return attributes_of(value)
