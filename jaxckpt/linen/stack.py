"""`Stack`: L equal Linen blocks under a plan, their parameters stacked in one tree.

    x = jaxckpt.linen.Stack(Block, num_blocks=28, remat="sqrt", name="layers")(x)

The parameter tree does not depend on the plan, so a checkpoint written under one plan loads under
any other. Blocks that change state beside their parameters (batch statistics, sown values) are
refused, unless `carry=` names its collection.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import DenyList
from flax.core.scope import intersect_filters

from jaxckpt.plans import Plan, PlanError
from jaxckpt.transforms import rows
from jaxckpt.transforms.arguments import apart, check_class, part, put
from jaxckpt.transforms.scan import scan
from jaxckpt.transforms.stack_update import is_attached

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

    The block's parameter names follow this module's name directly: row `i` of
    `params["layers"]["mlp"]["kernel"]` is the kernel of block `i`. Every random stream of `apply`
    (`rngs={"dropout": key}`) is split into one key per block.

    Attributes:
      block: A Linen module class, or a `functools.partial` of one, called with `parent=None`.
      num_blocks: The number of blocks, L.
      remat: A plan or its text, or a policy of `jax.checkpoint`.
      unroll: Blocks unrolled in one trip of a loop.
      dtype: The dtype in which blocks compute. Floating parameters are cast to it once, before a
        loop. Unrolled checkpointed blocks each cast their own parameters, which takes a little
        longer but needs no copy of all parameters. With None the stack casts nothing; a block may
        cast its parameters itself, each time it runs.
      out: The place of the carry in a block's result: an index, a key, or a function. The rest of a
        tuple or dict, such as hidden states or a router's loss, is returned stacked, `[L, ...]`.
        None if the result is the carry.
      carry: Names of collections of variables that blocks may change, such as `("batch_stats",)`
        or, for sown values, `("intermediates",)`. The arrays are `[L, ...]`; each block changes its
        row once, also if it is recomputed.

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
          *consts: Arguments of every block. Arrays get gradients; Python values, such as `True`,
            stay Python values.
          **named: Keyword arguments for every block, such as `deterministic=True`.

        Returns:
          The last block's carry; with `out`, the result of a block with its rest stacked.

        Raises:
          PlanError: The plan does not parse, does not fit L blocks, or names what no block has.
          ValueError: A block changes state that `self.carry` does not name, sows into a mutable
            collection that it does not name, holds a module from outside the stack, or changes the
            type of its carry.
        """
        block = self.block(parent=None)
        _check_unshared(block, consts, named)
        scope = self.scope
        assert scope is not None  # a module that is called is bound
        # `make_rng` takes the stream `params` for a stream that the caller gave no key for.
        keys = {name: jax.random.split(self.make_rng(name), self.num_blocks) for name in scope.rngs}
        arrays, merge = apart((consts, named))
        kept = (self.carry,) if isinstance(self.carry, str) else tuple(self.carry)
        if self.is_initializing():
            self._init_rows(block, kept, keys, carry, *consts, **named)

        cast = functools.partial(in_dtype, dtype=self.dtype)
        state = nn.meta.unbox({name: dict(one) for name, one in self.variables.items() if one})
        params = state.pop(_PARAMS, {})
        # Parameters that are updated in the backward pass are found by identity: they stay uncast.
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
                "parameters the blocks would not share; call it outside and pass its output to the "
                "stack, or make it with parent=None, which gives every block its own module"
            )


def _modules_of(block: nn.Module, consts, named) -> Iterator[tuple[str, nn.Module]]:
    """Yields `(where, module)` for each module in a block's fields and its call's arguments."""
    given = [(f"the block's {name}", value) for name, value in fields(block)]
    given += [("an argument of the stack", value) for value in (*consts, *named.values())]
    while given:
        where, tree = given.pop()
        for leaf in jax.tree.leaves(tree):
            if isinstance(leaf, nn.Module):
                yield where, leaf
                given += [(f"{where}.{name}", value) for name, value in fields(leaf)]


def fields(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the names and values of the fields that a module's call computes with."""
    for field in dataclasses.fields(module):
        if field.init and field.name not in ("parent", "name"):
            yield field.name, getattr(module, field.name)


def _kept(before, after, kept: Sequence[str]) -> dict:
    """Returns the collections that a stack keeps and its block changed.

    Args:
      before: The block's variables without its parameters.
      after: The block's variables without its parameters, after the call.
      kept: Names of the collections that the stack keeps.

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
    """Returns parameters with their floating leaves cast to a dtype.

    Args:
      params: A pytree of arrays.
      dtype: The dtype; None returns the parameters unchanged.

    Example:
      >>> import jax.numpy as jnp
      >>> cast = in_dtype({"w": jnp.ones(2), "n": jnp.ones(2, int)}, "bfloat16")
      >>> cast["w"].dtype.name, cast["n"].dtype.name
      ('bfloat16', 'int32')
    """
    if dtype is None:
        return params
    is_floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if is_floating(x) else x, params)
