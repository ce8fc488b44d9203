"""The words of the plan grammar: one table for schedules, one for policies.

Everything that knows a schedule or a policy by name (parser, printer, error texts, transforms)
reads these tables, so a new word is one row here and one function where it runs. A row names its
function as text, since plans are below schedules and never import JAX; `function_of` finds it.
"""

import dataclasses
import fnmatch
import importlib
import operator
from collections.abc import Callable, Collection

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
      makes: The function that makes the schedule, `"package.module:function"`; it takes the number
        of blocks and, where the word has one, its argument. None for what runs without a schedule.
      keeps_segments: Whether a whole segment's residuals are recorded together, those of the last
        segment in the forward pass. Other schedules record one block at a time.
    """

    argument: str | None = None
    policies: Collection[str] = ()
    meaning: str
    makes: str | None = None
    keeps_segments: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyWord:
    """What the grammar knows of one policy.

    Attributes:
      takes_names: Whether it lists names after its colon.
      meaning: One line for error texts and `--help`.
      saves: The function that says what is kept, `"package.module:function"`: of an equation, as
        `jax.checkpoint` asks its policies, True where the outputs are kept. None for the policies
        that speak of names.
    """

    takes_names: bool = False
    meaning: str
    saves: str | None = None


POLICIES = {
    "dots": PolicyWord(
        meaning="matmul outputs are kept", saves="jax:checkpoint_policies.dots_saveable"
    ),
    "dots_no_batch": PolicyWord(
        meaning="outputs of matmuls without batch dimensions are kept",
        saves="jax:checkpoint_policies.dots_with_no_batch_dims_saveable",
    ),
    "attention": PolicyWord(
        meaning="what the attention kernel's backward needs is kept",
        saves="jaxckpt.transforms.tags:is_of_attention",
    ),
    "names": PolicyWord(takes_names=True, meaning="tagged values are kept"),
    "offload": PolicyWord(takes_names=True, meaning="moved to pinned host memory and back"),
}

ALL_POLICIES = POLICIES.keys()  # a view of the table: whatever is added to it is taken too
CARRY_ONLY = ("offload:carry",)

SCHEDULES = {
    "none": ScheduleWord(meaning="no remat, every residual is saved"),
    "full": ScheduleWord(policies=ALL_POLICIES, meaning="every carry kept, each block recomputed"),
    "uniform": ScheduleWord(
        argument="segments",
        policies=ALL_POLICIES,
        meaning="N segments, each recomputed once",
        makes="jaxckpt.schedules.segments:uniform",
        keeps_segments=True,
    ),
    "every": ScheduleWord(
        argument="blocks",
        policies=ALL_POLICIES,
        meaning="segments of K blocks",
        makes="jaxckpt.schedules.segments:every",
        keeps_segments=True,
    ),
    "sqrt": ScheduleWord(
        policies=CARRY_ONLY,
        meaning="sqrt(L) segments, block inputs kept again inside each",
        makes="jaxckpt.schedules.segments:two_level",
    ),
    "log": ScheduleWord(
        policies=CARRY_ONLY,
        meaning="about log2(L) carries",
        makes="jaxckpt.schedules.of_stage:log",
    ),
    "binomial": ScheduleWord(
        argument="carries",
        policies=CARRY_ONLY,
        meaning="the fewest forwards with C carries",
        makes="jaxckpt.schedules.binomial:binomial",
    ),
    "auto": ScheduleWord(meaning="the planner chooses under a budget"),
}


def function_of(text: str) -> Callable:
    """Returns the function that a row names, `"package.module:function"`."""
    module, _, name = text.partition(":")
    return operator.attrgetter(name)(importlib.import_module(module))


def is_invented(name: str) -> bool:
    """Returns whether a name or glob speaks of values without a tag, such as `@dot.2`."""
    return name.startswith(INVENTED)


def matches(name: str, pattern: str) -> bool:
    """Returns whether a pattern means a name; globs over tags do not reach invented names."""
    return is_invented(name) == is_invented(pattern) and fnmatch.fnmatchcase(name, pattern)
