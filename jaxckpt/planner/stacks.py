"""The stacks of a step: found by tracing it, or given by the user.

`scan_blocks` tells who watches (`transforms.observers`), so a stack is found however deep in a
model it is run, and through Linen's and NNX's adapters. A block is made into a closed function of
abstract leaves at once, while what it closes over can still be traced.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxckpt.plans import Plan, PlanError, as_plan
from jaxckpt.plans.actions import Schedule
from jaxckpt.plans.plan_set import PlanSet
from jaxckpt.transforms.observers import StackCall
from jaxckpt.transforms.traced_block import abstract, first_block, trace_block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack as data for the planner: a pure block over lists of abstract leaves.

    Attributes:
      call: `call(carry, params_i, consts) -> carry`, all of them lists of leaves.
      carry: The block's input.
      params: Leaves `[L, ...]`.
      consts: What all blocks share, closed-over arrays among it.
      num_blocks: L.
      unroll: Blocks unrolled in one trip of its loop.
    """

    call: Callable
    carry: list[Any]
    params: list[Any]
    consts: list[Any]
    num_blocks: int
    unroll: int = 1

    @property
    def params_i(self) -> list[Any]:
        """One block's parameters."""
        return first_block(self.params)

    @property
    def params_bytes(self) -> int:
        """Bytes of all blocks' parameters."""
        return sum(_nbytes(leaf) for leaf in self.params)

    @property
    def carry_bytes(self) -> int:
        """Bytes of a block's input."""
        return sum(_nbytes(leaf) for leaf in self.carry)

    @property
    def shape(self) -> tuple:
        """What makes two stacks the same to the planner."""
        text = lambda leaves: tuple((tuple(x.shape), str(x.dtype)) for x in leaves)
        return (self.num_blocks, text(self.carry), text(self.params), text(self.consts))

    @classmethod
    def of(cls, block: Callable, params, carry, consts: Sequence, num_blocks: int) -> "Stack":
        """Returns the stack of a block; arguments as for `scan_blocks`, abstract ones too."""
        traced, _ = trace_block(block, carry, first_block(params), tuple(consts))
        # What the block hands on is no carry to the executor either.
        traced = traced.only_changed()
        carry, _, consts = traced.inputs
        return cls(
            call=traced.call,
            carry=carry,
            params=abstract(jax.tree.leaves(params)),
            consts=consts,
            num_blocks=num_blocks,
        )


class Finder:
    """Collects the stacks that follow a plan while a step is traced; hand it to `observed`.

    Attributes:
      stacks: Those that run under the plan, each once.
      others: What other stacks ran under, as text.
      calls: Of each stack, how many other calls came before its first.
      names: Of each stack, whose plan it runs under; of plans that are equal, the first.
    """

    def __init__(self, plan: Plan | PlanSet):
        self.plans = plan if isinstance(plan, PlanSet) else {"": plan}
        self.stacks: list[Stack] = []
        self.others: list[str] = []
        self.names: list[str] = []
        self.calls: list[int] = []
        self._seen: set[tuple] = set()
        self._count = 0

    def __call__(self, call: StackCall):
        """Takes note of one call of `scan_blocks`."""
        self._count += 1
        name = self._followed(call)
        if name is None:
            self.others.append(str(call.remat))
            return
        stack = Stack.of(call.block, call.params, call.carry, call.consts, call.num_blocks)
        stack = dataclasses.replace(stack, unroll=call.unroll)
        # A step's parts may be traced more than once; equal stacks weigh the same in every plan.
        if (name, stack.shape) not in self._seen:
            self._seen.add((name, stack.shape))
            self.stacks.append(stack)
            self.names.append(name)
            self.calls.append(self._count)

    def _followed(self, call: StackCall) -> str | None:
        """Returns the name of the plan that a call runs under, or None."""
        if isinstance(call.remat, Schedule):
            return None
        given = as_plan(call.remat).bind(call.num_blocks)
        bound = ((name, _bound(plan, call.num_blocks)) for name, plan in self.plans.items())
        return next((name for name, plan in bound if plan == given), None)


def _bound(plan: Plan, num_blocks: int) -> Plan | None:
    """Returns a plan for a number of blocks, or None where it is for another number."""
    try:
        return plan.bind(num_blocks)
    except PlanError:
        return None


def given_stack(block: Sequence, num_blocks: int, name: str = "block") -> Stack:
    """Returns the stack of `(block, params_i, carry, *consts)`, as `jaxckpt.explain` takes them.

    Raises:
      ValueError: Something else was given.
    """
    if not isinstance(block, tuple | list) or len(block) < 3 or not callable(block[0]):
        raise ValueError(f"{name} is (block, params_i, carry, *consts), as for jaxckpt.explain")
    call, params_i, carry, *consts = block
    widen = lambda x: jax.ShapeDtypeStruct((num_blocks, *x.shape), x.dtype)
    params = jax.tree.map(widen, abstract(params_i))
    return Stack.of(call, params, carry, tuple(consts), num_blocks)


def _nbytes(leaf) -> int:
    return leaf.size * leaf.dtype.itemsize
