"""Flax Linen adapters: a module class in, a rematerialized stack or class out.

    x = jaxckpt.linen.Stack(Block, num_blocks=28, remat="sqrt", name="layers")(x)

    for _ in range(28):                                      # a loop of one's own
        x = jaxckpt.linen.remat(Block, "attention")()(x)

The parameter tree does not depend on the plan, so a checkpoint written under one plan loads under
any other. Blocks with state beside parameters (batch statistics, caches) are refused.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import Scope

from jaxckpt.plans import Plan, PlanError, as_plan, words
from jaxckpt.transforms import policies, rows, tags
from jaxckpt.transforms.blocks import check_policies
from jaxckpt.transforms.stack import scan_blocks
from jaxckpt.transforms.traced_block import abstract

_PARAMS = "params"


class Stack(nn.Module):
    """L equal Linen blocks under a plan; their parameters are stacked `[L, ...]` in one tree.

    The block's own parameter names follow this module's name directly: block `i` of
    `params["layers"]["mlp"]["kernel"]` is its row `i`. Every random stream that `apply` is given
    (`rngs={"dropout": key}`) is split into one key a block.

    Attributes:
      block: A Linen module class, or a `functools.partial` of one, called without arguments.
      num_blocks: L.
      remat: A plan or its text.
      unroll: Blocks unrolled in one trip of a loop.
      dtype: Floating parameters are cast to it, for blocks that compute in it anyway: once, before
        a loop, where each block would cast its own in the forward pass, when it is run again and
        in the backward pass. Unrolled blocks that are checkpointed cast their own all the same:
        that takes a little longer, and spares the copy of all parameters. None leaves them as
        they are.
    """

    block: Callable[..., nn.Module]
    num_blocks: int
    remat: str | Plan = "full"
    unroll: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, carry, *consts, **static):
        """Returns the last block's carry.

        Args:
          carry: The first block's input; `block(carry, *consts, **static)` returns its like.
          *consts: Arrays handed to every block.
          **static: Python values handed to every block, such as `deterministic=True`.

        Raises:
          PlanError: As `jaxckpt.scan_blocks`.
          ValueError: A block with state beside its parameters, or one that changes its carry.
        """
        block = self.block(parent=None)
        keys = {
            stream: jax.random.split(self.make_rng(stream), self.num_blocks)
            for stream in _scope(self).rngs
            if stream != _PARAMS
        }
        if self.is_initializing():
            call = functools.partial(block.init, **static)
            self._init_params(call, keys, carry, *consts)

        cast = functools.partial(in_dtype, dtype=self.dtype)
        params = nn.meta.unbox(dict(self.variables.get(_PARAMS, {})))
        if not rows.reads_inside(self.remat, self.unroll):
            params, cast = cast(params), lambda params: params

        def apply(carry, block_i, *consts):
            variables = {_PARAMS: cast(block_i["params"])}
            return block.apply(variables, carry, *consts, rngs=block_i["keys"], **static)

        # The index is there for blocks that have neither parameters nor keys.
        blocks = {"params": params, "keys": keys, "index": jnp.arange(self.num_blocks)}
        return scan_blocks(apply, blocks, carry, *consts, remat=self.remat, unroll=self.unroll)

    def _init_params(self, init: Callable, keys, carry, *consts):
        """Draws every block's parameters from a key of its own and stores them stacked."""

        def init_one(key, keys):
            variables = init({_PARAMS: key, **keys}, carry, *consts)
            state = sorted(set(variables) - {_PARAMS})
            if state:
                raise ValueError(
                    f"the block keeps state in {', '.join(state)}, which a stack of checkpointed "
                    "blocks does not carry; put it into the carry, or use a layer without state "
                    "(LayerNorm or GroupNorm instead of BatchNorm)"
                )
            return variables.get(_PARAMS, {})

        stacked = jax.vmap(init_one)(
            jax.random.split(self.make_rng(_PARAMS), self.num_blocks), keys
        )
        stacked = nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "blocks"})
        for name, value in stacked.items():
            self.put_variable(_PARAMS, name, value)


def in_dtype(params, dtype):
    """Returns parameters with their floating leaves in a dtype; as they are if it is None."""
    if dtype is None:
        return params
    is_floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if is_floating(x) else x, params)


def remat(block: type[nn.Module], plan: str | Plan, **options) -> type[nn.Module]:
    """Returns a Linen module class whose call is checkpointed by `flax.linen.remat`.

    It keeps the name of `block`, and so the parameter tree of a model that uses it.

    Args:
      block: A Linen module class with a `__call__`.
      plan: `none`, `full` or policies, such as `"attention"`: what one block can follow.
      **options: For `flax.linen.remat`, such as `static_argnums`.

    Raises:
      PlanError: A plan that speaks of several blocks (use `Stack`); when the module is called, a
        name that matches nothing in the block.
    """
    plan = as_plan(plan)
    stage = plan.stages[0]
    if len(plan.stages) > 1 or stage.count or stage.schedule not in ("none", "full"):
        raise PlanError(
            f"plan {str(plan)!r} speaks of several blocks, linen.remat wraps one; it takes none, "
            "full and policies such as 'dots' or 'attention'; linen.Stack takes every plan"
        )
    if stage.offloads_carry:
        raise PlanError("offload:carry needs the blocks' inputs; linen.Stack takes it")
    if any(words.is_invented(name) for policy in stage.policies for name in policy.names):
        raise PlanError(
            f"plan {str(plan)!r} names values without a tag, which linen.remat does not find; "
            "linen.Stack does, or give them a tag (jaxckpt.tag)"
        )
    if stage.schedule == "none":
        return block
    policy = policies.checkpoint_policy(stage.policies)

    class Checkpointed(nn.remat(block, policy=policy, **options)):
        def __call__(self, *args, **kwargs):
            if not self.is_initializing():
                check_policies(plan, lambda _: _tags_of(block, self, args, kwargs))
            return super().__call__(*args, **kwargs)

    Checkpointed.__name__, Checkpointed.__qualname__ = block.__name__, block.__qualname__
    Checkpointed.__doc__ = block.__doc__
    return Checkpointed


def _tags_of(block: type[nn.Module], module: nn.Module, args, kwargs) -> tags.Tags:
    """Returns the tags of one call of a bound module, traced on an unbound twin of it."""
    fields = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(block)
        if field.init and field.name not in ("parent", "name")
    }
    twin = block(**fields, parent=None)
    rngs = {stream: jax.random.key(0) for stream in _scope(module).rngs}
    is_array = [hasattr(arg, "dtype") for arg in args]
    arrays = [arg for arg, dynamic in zip(args, is_array, strict=True) if dynamic]

    def call(variables, *arrays):
        rest = iter(arrays)
        merged = [
            next(rest) if dynamic else arg for arg, dynamic in zip(args, is_array, strict=True)
        ]
        return twin.apply(variables, *merged, rngs=rngs, mutable=True, **kwargs)[0]

    return tags.tags_of(call, abstract(dict(module.variables)), *abstract(arrays))


def _scope(module: nn.Module) -> Scope:
    assert module.scope is not None  # a module that is called is bound
    return module.scope
