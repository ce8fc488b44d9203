"""The words of the plan grammar: one table for schedules, one for policies.

The parser, the printer, error texts and transforms read these tables, so a new word is one row here
and one function. A row names its function as text, because plans import neither schedules nor JAX;
`function_of` imports it.
"""

import dataclasses
import fnmatch
import importlib
import operator
from collections.abc import Callable, Collection

CARRY = "carry"  # in `offload:carry`, the carries that the schedule keeps; never a tag
INVENTED = "@"  # begins invented names of values without a tag, such as `@dot.2`; no tag has it


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleWord:
    """A schedule's row in the grammar.

    Attributes:
      argument: The meaning of the number after the colon (`"segments"`, `"blocks"`, `"carries"`);
        None if the schedule has no number.
      policies: The policies that this schedule takes; `CARRY_ONLY` takes only `offload:carry`.
      meaning: One line for error texts and `--help`.
      makes: The function that makes the schedule, `"package.module:function"`. It takes the number
        of blocks, and the argument if there is one. None if the word runs without a schedule.
      keeps_segments: Whether a segment's blocks are recorded together, and the last segment in the
        forward pass. Other schedules record one block at a time.
    """

    argument: str | None = None
    policies: Collection[str] = ()
    meaning: str
    makes: str | None = None
    keeps_segments: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyWord:
    """A policy's row in the grammar.

    Attributes:
      takes_names: Whether names follow after a colon.
      meaning: One line for error texts and `--help`.
      saves: The function, `"package.module:function"`, that `jax.checkpoint` asks about an
        equation; it returns True to keep the outputs. None for policies that take names.
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

ALL_POLICIES = POLICIES.keys()  # a view of the table, so it includes rows that are added later
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
    """Imports and returns the function that a row names, `"package.module:function"`."""
    module, _, name = text.partition(":")
    return operator.attrgetter(name)(importlib.import_module(module))


def is_invented(name: str) -> bool:
    """Returns whether a name or glob is of values without a tag, such as `@dot.2`."""
    return name.startswith(INVENTED)


def matches(name: str, pattern: str) -> bool:
    """Returns whether a pattern matches a name; a glob over tags matches no invented name."""
    return is_invented(name) == is_invented(pattern) and fnmatch.fnmatchcase(name, pattern)
