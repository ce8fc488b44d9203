"""Which stacks of a step follow which of several plans: found by tracing it, or given by name.

The step is traced once a name, with that plan `none` and the others `full`; the order of the calls
is the order in which the stacks run.
"""

from collections.abc import Mapping, Sequence

from jaxckpt.planner.stacks import Stack, given_stack
from jaxckpt.planner.steps import Steps, program_text
from jaxckpt.plans import PlanError
from jaxckpt.plans.errors import nearest
from jaxckpt.plans.plan_set import PlanSet


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
    found, first = {}, {}
    for name, count in num_blocks.items():
        finder = _traced(steps, num_blocks, name)[1]
        places = [place for place, own in enumerate(finder.names) if own == name]
        if not places:
            raise ValueError(
                f"{_ignored(name)}: no stack runs under it; hand plans[{name!r}] to scan_blocks or "
                "Stack as remat=, or give the blocks as block={name: (block, params_i, carry, "
                "*consts), ...}"
            )
        found[name] = [finder.stacks[place] for place in places]
        first[name] = min(finder.calls[place] for place in places)
        wrong = [s.num_blocks for s in found[name] if s.num_blocks != count]
        if wrong:
            raise ValueError(
                f"num_blocks of {name!r} is {count}, but the step runs a stack of {wrong[0]} "
                "blocks under its plan"
            )
    return {name: found[name] for name in sorted(found, key=first.__getitem__)}


def _given(steps: Steps, num_blocks: Mapping[str, int], name: str, block: Sequence) -> Stack:
    """Returns the stack of a block that was given, if the step follows its plan."""
    with_full = _traced(steps, num_blocks)[0]
    if program_text(_traced(steps, num_blocks, name)[0]) == program_text(with_full):
        raise ValueError(f"{_ignored(name)}: the program is the same under 'none' and 'full'")
    return given_stack(block, num_blocks[name], f"block[{name!r}]")


def _traced(steps: Steps, num_blocks: Mapping[str, int], name: str | None = None):
    """Returns what `steps.trace` does of `full` everywhere but for one name."""
    plans = PlanSet.same(num_blocks, "full")
    plans = plans if name is None else plans.replace(name, "none")
    try:
        return steps.trace(plans)
    except PlanError as error:
        raise ValueError(f"step_for({plans}) does not trace: {error}") from error


def _ignored(name: str) -> str:
    return f"step_for ignores the plan of {name!r}"
