"""Finds the places where a step runs its stacks, and the stacks that follow a plan.

`scan_blocks` tells observers of its calls (`transforms.observers`). So a stack is found at any
depth of a model, and through Linen's and NNX's adapters. The observer marks each stack's input, and
the marks in the final jaxpr show the places. A call that was traced only for its shapes has no
place. A call that was traced once for two places has both places.

A stack follows a plan if its own plan changed between two traces under two plans.
"""

import collections
import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import TypeAlias

from jax.extend import core

from jaxckpt.costs.flat import Flat, Step, bodies, flatten
from jaxckpt.planner.stacks import Stack
from jaxckpt.plans import Plan, PlanError, as_plan
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms import jaxprs, tags
from jaxckpt.transforms.custom_gradient import inexact
from jaxckpt.transforms.cuts import Opened
from jaxckpt.transforms.observers import StackCall
from jaxckpt.transforms.policies import GivenPolicy
from jaxckpt.transforms.traced_block import TracedBlock
from jaxckpt.transforms.value_names import is_var

_MARK = "jaxckpt.stack."


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """One call of `scan_blocks`.

    Attributes:
      stack: The stack that the call runs.
      remat: The `remat` argument of the call as text: a plan, schedule or policy.
      plan: The bound plan; None for a schedule or a policy that is the user's function.
    """

    stack: Stack
    remat: str
    plan: Plan | None

    def is_under(self, plan: Plan) -> bool:
        """Returns whether the call was made with the given plan."""
        try:
            return self.plan is not None and self.plan == plan.bind(self.stack.num_blocks)
        except PlanError:  # the plan is for another number of blocks
            return False


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """A place of a program where a stack runs; places are compared by identity.

    Attributes:
      call: The call of `scan_blocks` that runs at the place.
      is_again: Whether `jax.checkpoint` recomputes the stack at the place for a backward pass.
    """

    call: Call
    is_again: bool


# A program's phases, one after the other. The items of a phase hold their memory at the same time.
# An item is a place, or a loop whose body has phases.
Phases: TypeAlias = "list[list[Place | Phases]]"


class Finder:
    """Records the calls of `scan_blocks` while a step is traced; an observer for `observed`."""

    def __init__(self):
        self._calls: list[Call] = []

    def __call__(self, call: StackCall):
        """Records one call; returns its carry with a mark.

        Raises:
          ValueError: A function under `checkpoint` computes nothing of its arguments.
        """
        if call.is_region and not _computes(call.block):
            raise ValueError(
                "nothing that a function under jaxckpt.checkpoint returns is computed from its "
                "arguments or from what it closes over, so there is nothing to plan"
            )
        made = Call(
            stack=Stack.of(
                call.block,
                call.params,
                call.num_blocks,
                unroll=call.unroll,
                is_region=call.is_region,
                ends=call.ends,
                mesh=call.mesh,
            ),
            remat=str(call.remat),
            plan=_plan_of(call),
        )
        # If possible, the marked leaf has a gradient and is read: JAX drops an unread leaf together
        # with its mark. A stack without a carry computes nothing.
        read = {v for e in call.block.jaxpr.jaxpr.eqns for v in e.invars if is_var(v)}
        variables = call.block.jaxpr.jaxpr.invars
        moving = inexact(call.carry)
        place = next((n for n in moving if variables[n] in read), next(iter(moving), 0))
        marked = tags.tag_reserved(call.carry[place : place + 1], f"{_MARK}{len(self._calls)}")
        self._calls.append(made)
        return [*call.carry[:place], *marked, *call.carry[place + 1 :]]

    def phases(self, jaxpr: core.ClosedJaxpr) -> Phases:
        """Returns the phases of the traced program, with the places of its stacks."""
        return self._phases(flatten(jaxpr))

    def _phases(self, flat: Flat) -> Phases:
        steps = flat.live_steps()
        last_use = {value: n for n, step in enumerate(steps) for value in step.inputs}
        phases: Phases = []
        end = -1  # where the last phase ends
        for n, step in enumerate(steps):
            found = self._found(step)
            if found is None:
                continue
            if n > end:
                phases.append([])
            phases[-1].append(found)
            loop = _forward(steps[n:]) if isinstance(found, Place) else step
            uses = [len(steps)] if loop is None else [last_use.get(x, n) for x in loop.outputs]
            end = max(end, n, *uses)
        return phases

    def _found(self, step: Step) -> "Place | Phases | None":
        """Returns the place or the phases of a step; None if the step runs no stack."""
        if step.name == jaxprs.TAG:
            name = step.params["name"]
            if not name.startswith(_MARK):
                return None
            is_again = any(call.params.get("differentiated") for call in step.calls)
            return Place(self._calls[int(name.removeprefix(_MARK))], is_again)
        inner = [self._phases(body) for body in bodies(step)]
        if step.name == jaxprs.COND:  # only one branch runs; the branch with most places counts
            inner = [max(inner, key=lambda phases: len(list(places(phases))))]
        return list(itertools.chain(*inner)) or None


def _computes(block: TracedBlock) -> bool:
    """Whether a result of a function is computed from the function's inputs."""
    opened = Opened.of(block.jaxpr)
    made = opened.dependent.difference(opened.jaxpr.invars)
    return any(is_var(out) and out in made for out in opened.jaxpr.outvars)


def _plan_of(call: StackCall) -> Plan | None:
    """Returns the bound plan of a call; None for a schedule or a policy that is a function."""
    if isinstance(call.remat, Schedule | GivenPolicy):
        return None
    plan = as_plan(call.remat)
    return plan if plan.graph else plan.bind(call.num_blocks)


def _forward(steps: Sequence[Step]) -> Step | None:
    """Returns the loop that runs a stack; None if the stack's blocks are unrolled.

    Args:
      steps: The step of the stack's mark, and the steps after the mark.
    """
    reached = set(steps[0].outputs)
    for step in steps:
        if not reached.isdisjoint(step.inputs):
            reached.update(step.outputs)
            if next(bodies(step), None) is not None:
                return step
    return None


def places(phases: Phases) -> Iterator[Place]:
    """Yields every place in the order of the program."""
    for item in itertools.chain(*phases):
        if isinstance(item, Place):
            yield item
        else:
            yield from places(item)


def held_together(phases: Phases, chosen: Collection[Place]) -> list[Place]:
    """Returns the chosen places whose stacks hold memory at the same time.

    A later phase reuses the memory of an earlier phase, as microbatches do. So if several phases
    run equal stacks, only the places of one phase are returned.

    Args:
      phases: The phases of a program.
      chosen: The places to choose from.
    """
    kept: list[Place] = []
    for phase in phases:
        found: list[Place] = []
        for item in phase:
            inner = [item] if isinstance(item, Place) else held_together(item, chosen)
            found += (place for place in inner if place in chosen)
        first = {place.call for place in found if not place.is_again}
        found = [place for place in found if not (place.is_again and place.call in first)]
        spare = collections.Counter(place.call.stack.shape for place in kept)
        for place in found:
            spare[place.call.stack.shape] -= 1
            if spare[place.call.stack.shape] < 0:
                kept.append(place)
    return kept


def following(one: Phases, plan: Plan, other: Phases, other_plan: Plan) -> list[Place]:
    """Returns the places of a program whose stacks follow its plan.

    Args:
      one: The phases of a step under `plan`.
      plan: The plan.
      other: The phases of the step under `other_plan`; its stacks run in the same order.
      other_plan: Another plan.
    """
    waiting = collections.defaultdict(collections.deque)
    for place in places(other):
        waiting[place.call.stack.shape].append(place)
    found = []
    for place in places(one):
        same = waiting[place.call.stack.shape]
        is_changed = not same or same.popleft().call.is_under(other_plan)
        if is_changed and place.call.is_under(plan):
            found.append(place)
    return found
