"""Watching stacks: an observer is called with every stack that a function runs while it is traced.

    with observed(watch):
        jax.make_jaxpr(train_step)(state, batch)

The planner finds a step's blocks this way, however deep inside a model they run. JAX may trace a
part of a step twice, or trace it once for several places. An observer may therefore mark the
stack's input: the marks in the final jaxpr show which stacks run.
"""

import contextlib
import contextvars
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AbstractMesh

from jaxckpt.plans import Plan
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms.policies import GivenPolicy
from jaxckpt.transforms.traced_block import TracedBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackCall:
    """One call of `scan_blocks`, `checkpoint` or `chain`; its arrays may be the caller's tracers.

    The function of `checkpoint` is one block without parameters, whose output may be any pytree. A
    chain is recorded in the same way, with the number of its blocks.

    Attributes:
      block: The traced block, without the leaves of the carry that the block returns unchanged.
      params: Leaves `[L, ...]`.
      carry: The leaves of the first block's input.
      remat: The plan, schedule or policy that was asked for.
      num_blocks: The number of blocks, L.
      unroll: Blocks unrolled in one trip.
      is_region: Whether the call is a function under `checkpoint`, or a chain.
      ends: For a chain, the number of steps of its function (`cuts.Opened`) before each block, and
        then the number of all steps; empty otherwise.
      mesh: The mesh around the call; its Manual axes are those of a `jax.shard_map`.
    """

    block: TracedBlock
    params: Any
    carry: list
    remat: str | Plan | Schedule | GivenPolicy
    num_blocks: int
    unroll: int
    is_region: bool = False
    ends: tuple[int, ...] = ()
    mesh: AbstractMesh = dataclasses.field(default_factory=jax.sharding.get_abstract_mesh)


# An observer returns the carry that the stack then runs on: the call's carry, marked or not.
Observer = Callable[[StackCall], list]

_OBSERVER: contextvars.ContextVar[Observer | None] = contextvars.ContextVar(
    "jaxckpt_stack_observer", default=None
)
_COUNT = itertools.count()


@contextlib.contextmanager
def observed(observer: Observer | None) -> Iterator[None]:
    """A context in which `scan_blocks` calls `observer`; None hides the calls from an outer one."""
    token = _OBSERVER.set(observer)
    try:
        # JAX would take an inner `jax.jit` that was traced before from its cache, and the observer
        # would not see it. These metadata are part of the cache's key; XLA never sees them.
        with set_xla_metadata(jaxckpt_observed=str(next(_COUNT))):
            yield
    finally:
        _OBSERVER.reset(token)


def is_observed() -> bool:
    """Returns whether an observer watches."""
    return _OBSERVER.get() is not None


def tell(call: StackCall) -> list:
    """Hands a call to the observer, if any; returns the carry to use."""
    observer = _OBSERVER.get()
    return call.carry if observer is None else observer(call)
