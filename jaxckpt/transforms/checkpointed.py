"""Schedules as nested `jax.checkpoint`: the simple reference for every way to run a stage.

A schedule is a list of cuts, outermost first. A cut divides the stage into segments; each segment
is a `jax.checkpoint` that keeps only its input, and the next cut divides it further. Every level
recomputes the stage once more. All of JAX's transforms are supported.

The same recursion runs over stacked parameters (`Stacked`, by `lax.scan`) and over a list of
different blocks (`Listed`, by a Python loop).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt.plans import Policy, Stage, words
from jaxckpt.schedules.segments import segment_sizes
from jaxckpt.transforms import rows, tags
from jaxckpt.transforms.custom_gradient import reversed_once
from jaxckpt.transforms.policies import GivenPolicy, checkpoint_policy

# (carry, one block's item) -> (carry, what the block returns beside it)
Apply = Callable[[Any, Any], tuple[Any, Any]]
Cut = Callable[[int], Sequence[int]]  # length -> sizes of its segments

_ONE_REVERSE = (
    "offload:carry has no second reverse mode (grad of grad); remat='full' without it has"
)
_OFFLOAD_CARRY = (Policy(kind="offload", names=(words.CARRY,)),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remat:
    """How a function is checkpointed: what it keeps, and whether its input goes to the host.

    Attributes:
      policies: The policies of a plan's stage.
      given: A policy that the user gave as a function; it replaces `policies`.
    """

    policies: tuple[Policy, ...] = ()
    given: GivenPolicy | None = None

    def __call__(self, fn: Callable, *, prevent_cse: bool) -> Callable:
        """Returns `fn(carry, item)` under `jax.checkpoint`."""
        inner = fn
        if any(words.CARRY in policy.names for policy in self.policies):
            # JAX saves an input on the device; only a tagged copy of it can go to the host.
            def inner(carry, item):
                # JAX has no transpose of a move to the host that is itself a gradient's.
                carry, item = reversed_once((carry, item), _ONE_REVERSE)
                return fn(tags.tag_reserved(carry, tags.CARRY), item)

        policy = self.given or checkpoint_policy(self.policies)
        return jax.checkpoint(inner, policy=policy, prevent_cse=prevent_cse)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stacked:
    """Blocks whose parameters are stacked on the leading axis of every leaf of `params`.

    Attributes:
      params: The parameters of these blocks, leaves `[length, ...]`.
      length: The number of blocks.
      unroll: Blocks unrolled in one trip of a loop.
      part_of: If the blocks read the parameters of a longer stack: these, and the row of the first
        block; else None.
      reverse: The block of the last row runs first.
    """

    params: Any
    length: int
    unroll: int = 1
    part_of: tuple[Any, int] | None = None
    reverse: bool = False

    def fold(self, apply: Apply, carry, remat: Remat | None):
        """Returns the carry after all blocks and the ys; a `remat` wraps each block."""
        return self._scan(
            apply, carry, self.params, self.length, min(self.unroll, self.length), remat
        )

    def fold_segments(self, sizes: Sequence[int], run: Apply, carry, remat: Remat):
        """Returns the carry and ys after `run(carry, segment)` of each segment under `remat`."""
        start, made = 0, []
        for size, equals in itertools.groupby(sizes):
            count = len(list(equals))
            stop = start + size * count
            cut = functools.partial(_cut, start=start, stop=stop, size=size)
            params = jax.tree.map(cut, self.params)
            segment = lambda params, k=size: Stacked(params=params, length=k, unroll=self.unroll)
            apply = lambda carry, params, make=segment: run(carry, make(params))
            carry, ys = self._scan(apply, carry, params, count, 1, remat)
            made.append(jax.tree.map(lambda y, n=size * count: y.reshape(n, *y.shape[2:]), ys))
            start = stop
        return carry, jax.tree.map(lambda *ys: jnp.concatenate(ys), *made)

    def _scan(self, apply, carry, items, length, unroll, remat):
        if remat is not None:
            if unroll > 1:
                apply, items = rows.read_inside(apply, items, *(self.part_of or (items, 0)))
            # A loop keeps the recomputation apart from the forward pass without barriers. XLA
            # unrolls a loop of one trip, which therefore needs them.
            apply = remat(apply, prevent_cse=unroll > 1 or length == 1)
        return lax.scan(apply, carry, items, length, self.reverse, unroll)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed:
    """Different blocks, in the form that `apply` takes; they may close over traced values.

    They return the carry and no ys.
    """

    blocks: tuple[Any, ...]

    @property
    def length(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    def fold(self, apply: Apply, carry, remat: Remat | None):
        """Returns the carry after all blocks, and None for ys; a `remat` wraps each block."""
        for block in self.blocks:
            carry, _ = _closed(apply, block, remat)(carry)
        return carry, None

    def fold_segments(self, sizes: Sequence[int], run: Apply, carry, remat: Remat):
        """Returns the carry after `run(carry, segment)` of each segment under `remat`, and None."""
        start = 0
        for size in sizes:
            segment = Listed(blocks=self.blocks[start : start + size])
            carry, _ = _closed(run, segment, remat)(carry)
            start += size
        return carry, None


def run_stage(
    blocks: Stacked | Listed, apply: Apply, carry, stage: Stage, given: GivenPolicy | None = None
):
    """Returns the carry after a stage's blocks, checkpointed as the stage says, and the ys.

    Args:
      blocks: The stage's blocks.
      apply: `apply(carry, block) -> (carry, y)`, which runs one block.
      carry: The stage's input.
      stage: A bound stage, with resolved policies.
      given: The user's own policy, for a stage that is `full`.

    Raises:
      NotImplementedError: The schedule is `auto`, which a planner must replace first, or one that
        nested `jax.checkpoint` cannot express, such as `binomial`.
    """
    cuts, leaf = _cuts_of(stage, given)
    outer = Remat(policies=_OFFLOAD_CARRY if stage.offloads_carry else ())
    return _run(blocks, apply, carry, cuts, leaf, outer)


def remat_of(stage: Stage, given: GivenPolicy | None = None) -> Remat | None:
    """Returns how each block of a stage without segments is checkpointed; None if it is not."""
    cuts, leaf = _cuts_of(stage, given)
    assert not cuts, stage
    return leaf


def _cuts_of(stage: Stage, given: GivenPolicy | None):
    cuts, leaf = _CUTS.get(stage.schedule, _not_nested)(stage)
    return cuts, leaf if given is None else Remat(given=given)


def _run(blocks, apply, carry, cuts: Sequence[Cut], leaf: Remat | None, outer: Remat):
    if not cuts:
        return blocks.fold(apply, carry, leaf)
    inner = lambda carry, segment: _run(segment, apply, carry, cuts[1:], leaf, outer)
    return blocks.fold_segments(cuts[0](blocks.length), inner, carry, outer)


def _none(stage: Stage):
    return (), None


def _full(stage: Stage):
    return (), Remat(policies=stage.policies)


def _uniform(stage: Stage):
    segments = stage.argument
    assert segments is not None, stage  # `uniform` and `every` always have a number
    if stage.schedule == "every":
        segments = math.ceil(stage.bound_count / segments)
    # The policies apply to the blocks of the live segment. `offload:carry` applies to the inputs
    # of segments; `run_stage` moves them.
    kept = stage.inner_policies
    leaf = Remat(policies=kept) if kept else None
    return (lambda length: segment_sizes(length, segments),), leaf


def _sqrt(stage: Stage):
    segments = math.isqrt(stage.bound_count - 1) + 1
    return (lambda length: segment_sizes(length, segments),), Remat()


def _log(stage: Stage):
    # Halved until segments have at most two blocks; these keep their inputs.
    halvings = max(0, stage.bound_count.bit_length() - 2)
    return (_halves,) * halvings, Remat()


def _halves(length: int) -> tuple[int, ...]:
    """Returns two equal halves, and one block more if the length is odd: few sizes to trace."""
    if length < 2:
        return (1,) * length
    return (length // 2, length // 2, *(1,) * (length % 2))


def _not_nested(stage: Stage):
    raise NotImplementedError(
        f"{stage} needs the schedule executor; of the nested schedules, log is the nearest"
    )


def _auto(stage: Stage):
    raise NotImplementedError("auto needs the planner and a budget; name a plan, such as sqrt")


_CUTS = {
    "none": _none,
    "full": _full,
    "uniform": _uniform,
    "every": _uniform,
    "sqrt": _sqrt,
    "log": _log,
    "auto": _auto,
}


def _cut(x, start: int, stop: int, size: int):
    """Returns rows `start..stop` of `x` as `[segments, size, ...]`."""
    rows = x if (start, stop) == (0, x.shape[0]) else lax.slice_in_dim(x, start, stop)
    return rows.reshape(-1, size, *x.shape[1:])


def _closed(apply: Apply, item, remat: Remat | None) -> Callable:
    """Returns `apply` on `item` as a function of the carry alone; a `remat` wraps it."""
    if remat is None:
        return lambda carry: apply(carry, item)
    checkpointed = remat(lambda carry, _: apply(carry, item), prevent_cse=True)
    return lambda carry: checkpointed(carry, None)
