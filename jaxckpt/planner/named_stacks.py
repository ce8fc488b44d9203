"""Which stacks of a step follow which of several plans: found by tracing it, or given by name.

The step is traced once a name, with that plan `none` and the others `full`; the order of the calls
is the order in which the stacks run.
"""

from collections.abc import Mapping, Sequence

from jaxckpt.planner.places import following, held_together, places
from jaxckpt.planner.stacks import Stack, given_stack
from jaxckpt.planner.steps import Steps, Trace, is_same_program
from jaxckpt.plans import Plan
from jaxckpt.plans.errors import nearest
from jaxckpt.plans.plan_set import PlanSet

_FULL, _NONE = Plan.parse("full"), Plan.parse("none")


def check_blocks(
    blocks: Sequence | Mapping[str, Sequence] | None, num_blocks: int | Mapping[str, int]
):
    """Raises `ValueError` for blocks of several stacks that are not one for each name."""
    if blocks is None or not isinstance(num_blocks, Mapping):
        return
    names = ", ".join(map(repr, num_blocks))
    if not isinstance(blocks, Mapping):
        raise ValueError(f"block is one for each stack by name, as num_blocks is: {names}")
    for name in blocks:
        if name not in num_blocks:
            guess = nearest(str(name), num_blocks)
            raise ValueError(f"block has {name!r}, which num_blocks has not: {names}{guess}")
    missing = [name for name in num_blocks if name not in blocks]
    if missing:
        raise ValueError(f"block has none for {missing[0]!r}; num_blocks has {names}")


def named_stacks(
    steps: Steps, num_blocks: Mapping[str, int], blocks: Mapping[str, Sequence] | None = None
) -> dict[str, list[Stack]]:
    """Returns the stacks of each name, names in the order in which their stacks first run.

    Args:
      steps: Of the plans.
      num_blocks: Of each stack.
      blocks: As for `jaxckpt.fit`, in the order in which they run.

    Raises:
      ValueError: No stack follows a name's plan, or one has another number of blocks.
    """
    if blocks is not None:
        return {name: [_given(steps, num_blocks, name, block)] for name, block in blocks.items()}
    full = steps.trace(PlanSet.same(num_blocks, _FULL))
    order = list(places(full.phases))
    found, first = {}, {}
    for name, count in num_blocks.items():
        none = _traced_without(steps, num_blocks, name)
        followers = following(full.phases, _FULL, none.phases, _NONE)
        if not followers:
            raise ValueError(
                f"{_ignored(name)}: no stack runs under it; hand plans[{name!r}] to scan_blocks or "
                "Stack as remat=, or give the blocks as block={name: (block, params_i, carry, "
                "*consts), ...}"
            )
        found[name] = [place.call.stack for place in held_together(full.phases, followers)]
        first[name] = min(map(order.index, followers))
        wrong = [s.num_blocks for s in found[name] if s.num_blocks != count]
        if wrong:
            raise ValueError(
                f"num_blocks of {name!r} is {count}, but the step runs a stack of {wrong[0]} "
                "blocks under its plan"
            )
    return {name: found[name] for name in sorted(found, key=first.__getitem__)}


def _given(steps: Steps, num_blocks: Mapping[str, int], name: str, block: Sequence) -> Stack:
    """Returns the stack of a block that was given, if the step follows its plan."""
    full = steps.trace(PlanSet.same(num_blocks, _FULL))
    if is_same_program(full, _traced_without(steps, num_blocks, name)):
        raise ValueError(f"{_ignored(name)}: the program is the same under 'none' and 'full'")
    return given_stack(block, num_blocks[name], f"block[{name!r}]")


def _traced_without(steps: Steps, num_blocks: Mapping[str, int], name: str) -> Trace:
    """Returns the step under `full` everywhere but for one name, which is `none`."""
    return steps.trace(PlanSet.same(num_blocks, _FULL).replace(name, _NONE))


def _ignored(name: str) -> str:
    return f"step_for ignores the plan of {name!r}"
