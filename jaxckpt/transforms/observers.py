"""Watching stacks: who wants to know which blocks a function runs is told while it is traced.

    with observed(watch):
        jax.make_jaxpr(train_step)(state, batch)

A planner learns a step's blocks this way, however deep inside a model they are run. A part of a
step may be traced more than once, or once for several places. So a watcher gets to mark the stack's
input: what the jaxpr has in the end is what runs.
"""

import contextlib
import contextvars
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental.xla_metadata import set_xla_metadata

from jaxckpt.plans import Plan
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms.policies import GivenPolicy
from jaxckpt.transforms.traced_block import TracedBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackCall:
    """One call of `scan_blocks`, as it was made: its arrays may be tracers of the caller.

    Attributes:
      block: The block, traced, without the leaves of its carry that it hands on.
      params: Leaves `[L, ...]`.
      carry: The leaves of the first block's input.
      remat: What was asked for.
      num_blocks: L.
      unroll: Blocks unrolled in one trip.
    """

    block: TracedBlock
    params: Any
    carry: list
    remat: str | Plan | Schedule | GivenPolicy
    num_blocks: int
    unroll: int


# Returns the carry to go on with: the call's own, or the same under a mark.
Observer = Callable[[StackCall], list]

_OBSERVER: contextvars.ContextVar[Observer | None] = contextvars.ContextVar(
    "jaxckpt_stack_observer", default=None
)
_COUNT = itertools.count()


@contextlib.contextmanager
def observed(observer: Observer | None) -> Iterator[None]:
    """A context in which every `scan_blocks` calls `observer`; None stops an outer one's view."""
    token = _OBSERVER.set(observer)
    try:
        # Inner functions under `jax.jit` that were traced before would be taken from JAX's cache,
        # unseen; its key has these metadata. They go no further than the jaxpr.
        with set_xla_metadata(jaxckpt_observed=str(next(_COUNT))):
            yield
    finally:
        _OBSERVER.reset(token)


def tell(call: StackCall) -> list:
    """Hands a call to the observer, if any; returns the carry to use."""
    observer = _OBSERVER.get()
    return call.carry if observer is None else observer(call)
