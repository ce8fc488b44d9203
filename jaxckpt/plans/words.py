"""The words of the plan grammar: one table for schedules, one for policies.

Everything that knows a schedule or a policy by name (parser, printer, error texts, transforms)
reads these tables, so a new word is one entry here and one function where it runs.
"""

import dataclasses
import fnmatch

CARRY = "carry"  # reserved in `offload:carry`: the carries that the schedule keeps, never a tag.
INVENTED = "@"  # begins the name of a value without a tag, such as `@dot.2`; in no tag.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleWord:
    """What the grammar knows of one schedule.

    Attributes:
      argument: What stands after the colon (`"segments"`, `"blocks"`, `"carries"`), or None.
      policies: Names of the policies that this schedule takes; `offload:carry` is the one form of
        `offload` in `CARRY_ONLY`.
      meaning: One line for error texts and `--help`.
    """

    argument: str | None = None
    policies: tuple[str, ...] = ()
    meaning: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyWord:
    """What the grammar knows of one policy: whether it lists names, and its meaning."""

    takes_names: bool = False
    meaning: str


POLICIES = {
    "dots": PolicyWord(meaning="matmul outputs are kept"),
    "dots_no_batch": PolicyWord(meaning="outputs of matmuls without batch dimensions are kept"),
    "attention": PolicyWord(meaning="what the attention kernel's backward needs is kept"),
    "names": PolicyWord(takes_names=True, meaning="tagged values are kept"),
    "offload": PolicyWord(takes_names=True, meaning="moved to pinned host memory and back"),
}

ALL_POLICIES = tuple(POLICIES)
CARRY_ONLY = ("offload:carry",)

SCHEDULES = {
    "none": ScheduleWord(meaning="no remat, every residual is saved"),
    "full": ScheduleWord(policies=ALL_POLICIES, meaning="every carry kept, each block recomputed"),
    "uniform": ScheduleWord(
        argument="segments", policies=ALL_POLICIES, meaning="N segments, each recomputed once"
    ),
    "every": ScheduleWord(argument="blocks", policies=ALL_POLICIES, meaning="segments of K blocks"),
    "sqrt": ScheduleWord(
        policies=CARRY_ONLY, meaning="sqrt(L) segments, block inputs kept again inside each"
    ),
    "log": ScheduleWord(policies=CARRY_ONLY, meaning="about log2(L) carries"),
    "binomial": ScheduleWord(
        argument="carries", policies=CARRY_ONLY, meaning="the fewest forwards with C carries"
    ),
    "auto": ScheduleWord(meaning="the planner chooses under a budget"),
}


def is_invented(name: str) -> bool:
    """Returns whether a name or glob speaks of values without a tag, such as `@dot.2`."""
    return name.startswith(INVENTED)


def matches(name: str, pattern: str) -> bool:
    """Returns whether a pattern means a name; globs over tags do not reach invented names."""
    return is_invented(name) == is_invented(pattern) and fnmatch.fnmatchcase(name, pattern)
