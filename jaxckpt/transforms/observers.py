"""Watching stacks: who wants to know which blocks a function runs is told while it is traced.

    with observed(seen.append):
        jax.make_jaxpr(train_step)(state, batch)

A planner learns a step's blocks this way, however deep inside a model they are run.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from jaxckpt.plans import Plan
from jaxckpt.plans.actions import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackCall:
    """One call of `scan_blocks`, as it was made: its arrays may be tracers of the caller.

    Attributes:
      block: The block.
      params: Leaves `[L, ...]`.
      carry: The first block's input.
      consts: What all blocks share.
      remat: What was asked for.
      num_blocks: L.
      unroll: Blocks unrolled in one trip.
    """

    block: Callable
    params: Any
    carry: Any
    consts: tuple
    remat: str | Plan | Schedule
    num_blocks: int
    unroll: int


_OBSERVER: contextvars.ContextVar[Callable[[StackCall], None] | None] = contextvars.ContextVar(
    "jaxckpt_stack_observer", default=None
)


@contextlib.contextmanager
def observed(observer: Callable[[StackCall], None] | None) -> Iterator[None]:
    """A context in which every `scan_blocks` calls `observer`; None stops an outer one's view."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


def tell(**fields):
    """Hands a `StackCall` of these fields to the observer, if there is one."""
    observer = _OBSERVER.get()
    if observer is not None:
        observer(StackCall(**fields))
