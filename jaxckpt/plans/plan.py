"""A plan as frozen data: `Plan` is a tuple of `Stage`s, a `Stage` one schedule and its policies.

    plan = Plan.parse("14xfull/attention+names:q,k")
    plan.bind(28).stages[1].count    # 14

Everything is validated where it is made, without JAX. Whether a name matches any value of a block
is checked when the block is traced.

The grammar:

    plan   := [graph "/"] stage ("/" stage)*
    stage  := [count "x"] schedule ("+" policy)*      a bare policy is short for full+policy
    graph  := "graph:" steps "-" values               the plan is for a function, not a stack

A plan that begins with a graph is for one function (`jaxckpt.checkpoint`), which is cut into
segments. Each stage is a segment; its count is the number of the function's steps in the segment.
`none` keeps the values that the segment's gradient reads. `full` recomputes the segment from its
inputs, except for the values that its policies keep. `steps` and `values` are digests of the
function (`transforms/cuts.py`).

The parser cuts text into words. `Stage` and `Policy` check what the words mean, and the parser adds
to their errors the place in the text.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Self

from jaxckpt.plans import words
from jaxckpt.plans.errors import PlanError, mark, nearest

NAME = re.compile(r"[A-Za-z0-9_.\-]+")  # a tag; safe in every shell without quotes
# A tag, an invented name (`@dot.2`), or a glob over either.
PATTERN = re.compile(r"@?[A-Za-z0-9_.\-*]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Values that a block keeps or moves: a word of `words.POLICIES`, with names if it takes them.

    Attributes:
      kind: `"dots"`, `"dots_no_batch"`, `"names"`, `"attention"` or `"offload"`.
      names: Tags, invented names or `*` globs, in the order given; `("carry",)` in `offload:carry`.

    Raises:
      PlanError: The kind is unknown, or its names are missing, ill-formed or not allowed.
    """

    kind: str
    names: tuple[str, ...] = ()

    def __post_init__(self):
        if self.kind not in words.POLICIES:
            raise PlanError(
                f"{self.kind!r} is not a policy{nearest(self.kind, words.POLICIES)}; "
                f"policies: {', '.join(words.POLICIES)}"
            )
        if not words.POLICIES[self.kind].takes_names:
            if self.names:
                raise PlanError(f"{self.kind} takes no names; did you mean names:{self.names[0]}?")
            return
        if not self.names:
            raise PlanError(f"{self.kind} needs names, such as {self.kind}:q,k")
        for name in self.names:
            if not PATTERN.fullmatch(name):
                what = repr(name) if name else "an empty name"
                raise PlanError(
                    f"{what} in {self.kind}:{','.join(self.names)} is not valid; "
                    "names are letters, digits, '_', '.', '-' and '*' for globs, after '@' for "
                    "values without a tag"
                )
        if self.kind == "names" and words.CARRY in self.names:
            raise PlanError(
                f"{words.CARRY!r} is a reserved word, not a tag; did you mean offload:carry? "
                "(every schedule keeps its carries)"
            )
        object.__setattr__(self, "names", tuple(dict.fromkeys(self.names)))

    def __str__(self) -> str:
        return f"{self.kind}:{','.join(self.names)}" if self.names else self.kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of consecutive blocks under one schedule and one set of policies.

    Attributes:
      count: The number of blocks; None for "the rest" (only in the last stage).
      schedule: A word of `words.SCHEDULES`.
      argument: The number after the colon: segments, blocks per segment, or carries; None if the
        schedule has no number.
      policies: The policies of a block; at most one `Policy` of a kind, in the table's order.

    Raises:
      PlanError: A schedule, argument or policy is unknown or does not fit.
    """

    count: int | None = None
    schedule: str
    argument: int | None = None
    policies: tuple[Policy, ...] = ()

    def __post_init__(self):
        word = words.SCHEDULES.get(self.schedule)
        if word is None:
            raise PlanError(
                f"{self.schedule!r} is not a schedule{nearest(self.schedule, words.SCHEDULES)}; "
                f"schedules: {', '.join(words.SCHEDULES)}"
            )
        if self.count is not None and self.count < 1:
            raise PlanError(f"a stage of {self.count} blocks; a count is at least 1")
        self._check_argument(word)
        object.__setattr__(self, "policies", _merge(self.policies))
        self._check_policies(word)

    @property
    def bound_count(self) -> int:
        """The number of blocks of a bound stage."""
        assert self.count is not None, self
        return self.count

    def _check_argument(self, word: words.ScheduleWord):
        if word.argument is None:
            if self.argument is not None:
                takers = [f"{name}:N" for name, w in words.SCHEDULES.items() if w.argument]
                raise PlanError(
                    f"{self.schedule} takes no number (given {self.argument}); "
                    f"those that do: {', '.join(takers)}"
                )
            return
        if self.argument is None:
            raise PlanError(
                f"{self.schedule} needs its number of {word.argument}, such as {self.schedule}:4"
            )
        if self.argument < 1:
            raise PlanError(
                f"{self.schedule}:{self.argument} asks for {self.argument} {word.argument}; "
                f"the least is {self.schedule}:1"
            )
        if self.count is not None and self.argument > self.count:
            raise PlanError(
                f"{self.schedule}:{self.argument} asks for {self.argument} {word.argument}, but "
                f"the stage has {self.count} {_blocks(self.count)}; the most is "
                f"{self.schedule}:{self.count}"
            )

    def _check_policies(self, word: words.ScheduleWord):
        kinds = [policy.kind for policy in self.policies]
        if "dots" in kinds and "dots_no_batch" in kinds:
            raise PlanError(
                "dots and dots_no_batch contradict each other for matmuls with batch dimensions; "
                "write one of them"
            )
        _check_disjoint(self.policies)
        for policy in self.policies:
            if policy.kind in word.policies or str(policy) in word.policies:
                continue
            takers = [
                name
                for name, other in words.SCHEDULES.items()
                if policy.kind in other.policies or str(policy) in other.policies
            ]
            takes = f"{self.schedule} takes " + (" and ".join(word.policies) or "no policy")
            raise PlanError(f"{takes}, not {policy}; {', '.join(takers)} take {policy}")

    @property
    def offloads_carry(self) -> bool:
        """Whether the carries that the schedule keeps go to the host."""
        return any(p.kind == "offload" and words.CARRY in p.names for p in self.policies)

    @property
    def inner_policies(self) -> tuple[Policy, ...]:
        """The policies on values inside a block: all of them, without the name `carry`."""
        names = lambda policy: tuple(name for name in policy.names if name != words.CARRY)
        pairs = [(policy, names(policy)) for policy in self.policies]
        # A policy that had names and has none left was `offload:carry` alone.
        return tuple(
            dataclasses.replace(policy, names=left)
            for policy, left in pairs
            if left or not policy.names
        )

    def __str__(self) -> str:
        count = "" if self.count is None else f"{self.count}x"
        schedule = self.schedule if self.argument is None else f"{self.schedule}:{self.argument}"
        parts = [str(policy) for policy in self.policies]
        if self.schedule != "full" or not parts:
            parts.insert(0, schedule)
        return count + "+".join(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a stack of blocks is checkpointed: stages that cover its blocks in order.

    `Plan.parse(text)` makes one from the grammar; `str(plan)` prints it, and parses back to an
    equal plan. Hashable, so it may be a static argument.

    Attributes:
      stages: At least one; only the last may leave its count out.
      graph: The digests of the function that the plan is for, such as `"3f9a01-c4427e"`; its stages
        are then segments of the function. Empty for a plan of blocks.

    Raises:
      PlanError: There is no stage, a count is missing before the last stage, `auto` stands beside
        other stages, or a segment of a function has a schedule of several blocks.
    """

    stages: tuple[Stage, ...]
    graph: str = ""

    def __post_init__(self):
        if not self.stages:
            raise PlanError("a plan has at least one stage, such as 'sqrt'")
        text = str(self)
        if self.graph:
            self._check_graph()
        if len(self.stages) > 1 and any(stage.schedule == "auto" for stage in self.stages):
            raise PlanError(f"plan {text!r}: auto chooses the whole plan, so it stands alone")
        for stage in self.stages[:-1]:
            if stage.count is None:
                raise PlanError(
                    f"plan {text!r}: stage {str(stage)!r} needs a count, such as 4x{stage}; "
                    "only the last stage may leave it out"
                )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the plan that a text spells; the README lists the words.

        Raises:
          PlanError: The text is no plan; the error marks the place and names what is valid.
        """
        if not isinstance(text, str):
            _refuse_function(text)
            raise PlanError(f"a plan is parsed from text such as 'sqrt', not from {text!r}")
        head, slash, _ = text.partition("/")
        if not head.startswith(_GRAPH):
            return cls(stages=parse_stages(text))
        stages = parse_stages(text, len(head) + 1, _check_segment) if slash else ()
        return _at(text, (0, len(head)), cls, stages=stages, graph=head.removeprefix(_GRAPH))

    def _check_graph(self):
        if not _DIGESTS.fullmatch(self.graph):
            raise PlanError(
                f"after {_GRAPH} stand two digests of six letters and digits, such as "
                f"{_GRAPH}3f9a01-c4427e; jaxckpt.fit makes such plans"
            )
        for stage in self.stages:
            _check_segment(stage)

    @property
    def num_blocks(self) -> int | None:
        """The number of blocks that the plan covers; None if the last stage has no count."""
        if self.stages[-1].count is None:
            return None
        return self.bound_count

    @property
    def bound_count(self) -> int:
        """The number of blocks of a bound plan."""
        return sum(stage.bound_count for stage in self.stages)

    @property
    def written(self) -> str:
        """The plan's text as people write it: a lone stage has no count."""
        alone = len(self.stages) == 1
        return str(dataclasses.replace(self.stages[0], count=None)) if alone else str(self)

    def bind(self, num_blocks: int) -> Self:
        """Returns the same plan for a stack of `num_blocks` blocks: every count is a number.

        Raises:
          PlanError: The counts do not add up to `num_blocks`, or a stage is too short for its
            schedule's number.
        """
        if num_blocks < 1:
            raise PlanError(f"a stack of {num_blocks} blocks; a plan needs at least 1")
        if self.graph:
            raise PlanError(
                f"plan {str(self)!r} is for one function, which jaxckpt.checkpoint(fn, remat=) "
                "runs; it says nothing of a list or stack of blocks"
            )
        fixed = sum(stage.count or 0 for stage in self.stages)
        if self.num_blocks is not None:
            if fixed != num_blocks:
                raise PlanError(
                    f"plan {str(self)!r} covers {fixed} {_blocks(fixed)}, the stack has "
                    f"{num_blocks}; leave the last count out to mean the rest"
                )
            return self
        if fixed >= num_blocks:
            raise PlanError(
                f"plan {str(self)!r} leaves no block for its last stage: {fixed} counted, "
                f"the stack has {num_blocks}"
            )
        last = self.stages[-1]
        try:
            last = dataclasses.replace(last, count=num_blocks - fixed)
        except PlanError as error:
            raise PlanError(f"plan {str(self)!r} on {num_blocks} blocks: {error}") from None
        return dataclasses.replace(self, stages=(*self.stages[:-1], last))

    def bind_graph(self, graph: str, num_steps: int) -> Self:
        """Returns a graph's plan for a function, with every count a number.

        Args:
          graph: The digests of the function.
          num_steps: The number of its steps.

        Raises:
          PlanError: The plan is for another function; the text says what differs.
        """
        counted = sum(stage.count or 0 for stage in self.stages)
        is_open = self.stages[-1].count is None
        steps, _, values = graph.partition("-")
        of_steps, _, of_values = self.graph.partition("-")
        if counted + is_open > num_steps or (not is_open and counted != num_steps):
            differs = f"it has {num_steps} steps, the plan {'more than ' * is_open}{counted}"
        elif of_steps != steps:
            differs = (
                "its steps are others (another function, or another release of JAX or jaxckpt, "
                "which may count its steps in another way)"
            )
        elif of_values != values:
            differs = "the steps are the same, but shapes or dtypes differ"
        elif is_open:
            last = dataclasses.replace(self.stages[-1], count=num_steps - counted)
            return dataclasses.replace(self, stages=(*self.stages[:-1], last))
        else:
            return self
        raise PlanError(
            f"plan {str(self)!r} is for another function than this one ({_GRAPH}{graph}): "
            f"{differs}; jaxckpt.fit makes a plan for it"
        )

    def __str__(self) -> str:
        stages = "/".join(str(stage) for stage in self.stages)
        return f"{_GRAPH}{self.graph}/{stages}" if self.graph else stages


def as_plan(remat: "str | Plan") -> Plan:
    """Returns `remat` as a `Plan`; every public function takes either form.

    Raises:
      PlanError: `remat` is neither text nor a plan, or does not parse.
    """
    if isinstance(remat, Plan):
        return remat
    if isinstance(remat, str):
        return Plan.parse(remat)
    _refuse_function(remat)
    raise PlanError(f"remat is a plan such as 'sqrt' or a jaxckpt.Plan, not {remat!r}")


def _refuse_function(given):
    """Raises `PlanError` if a policy of `jax.checkpoint` is given where only a plan is valid."""
    if callable(given):
        rows = words.POLICIES.items()
        same = [name for name, row in rows if row.saves and words.function_of(row.saves) == given]
        advice = repr(same[0]) if same else "a plan's text, such as 'dots' or 'names:a,b',"
        raise PlanError(
            f"{getattr(given, '__name__', repr(given))} is a function; a plan that is planned, "
            f"printed or stored has to be text; give {advice} instead"
        )


def _check_segment(stage: Stage) -> Stage:
    """Returns a stage that can be a segment of a function; raises `PlanError` for another."""
    if stage.schedule not in ("none", "full") or stage.offloads_carry:
        raise PlanError(
            f"{str(stage)!r} cannot be a segment of a function; valid segments are none, full and "
            "policies such as names:q or dots, with the number of its steps before it"
        )
    return stage


def _blocks(count: int) -> str:
    return "block" if count == 1 else "blocks"


def _merge(policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
    """Merges policies of one kind and sorts kinds as in the table: one spelling per meaning."""
    merged = []
    for kind in words.POLICIES:
        same = [policy for policy in policies if policy.kind == kind]
        if same:
            names = tuple(name for policy in same for name in policy.names)
            merged.append(Policy(kind=kind, names=names))
    return tuple(merged)


def _check_disjoint(policies: tuple[Policy, ...]):
    """Raises `PlanError` if a value is both kept on the device and moved to the host."""
    kept = [name for policy in policies if policy.kind == "names" for name in policy.names]
    moved = [name for policy in policies if policy.kind == "offload" for name in policy.names]
    for one in kept:
        for other in moved:
            if words.matches(one, other) or words.matches(other, one):
                raise PlanError(
                    f"names:{one} keeps on the device what offload:{other} moves to the host; "
                    "name each value once"
                )


# At most nine digits, so that no number is too long to print or to count with.
_COUNT = re.compile(r"(-?[0-9]{1,9})x(.*)", re.DOTALL)
_NUMBER = re.compile(r"-?[0-9]{1,9}")
_GRAPH = "graph:"
_DIGESTS = re.compile(r"[0-9a-f]{6}-[0-9a-f]{6}")


def parse_stages(
    text: str, start: int = 0, check: Callable[[Stage], Stage] = lambda stage: stage
) -> tuple[Stage, ...]:
    """Returns the stages that a text spells from its letter `start` on, each checked.

    Raises:
      PlanError: The text is no plan; the error marks the place and names what is valid.
    """
    stages = []
    for piece in text[start:].split("/"):
        place = start, start + len(piece)
        stages.append(_at(text, place, check, stage=_parse_stage(text, *place)))
        start += len(piece) + 1
    return tuple(stages)


def _parse_stage(text: str, start: int, stop: int) -> Stage:
    count, body = None, text[start:stop]
    match = _COUNT.fullmatch(body)
    if match:
        count, body = int(match[1]), match[2]
    schedule, argument, policies = "full", None, []
    offset = stop - len(body)
    for position, word in enumerate(body.split("+")):
        place = (offset, offset + len(word))
        offset += len(word) + 1
        head, colon, tail = word.partition(":")
        if head in words.POLICIES:
            names = tuple(tail.split(",")) if colon else ()
            policies.append(_at(text, place, Policy, kind=head, names=names))
        elif head in words.SCHEDULES and position == 0:
            schedule, argument = head, _argument(text, place, tail) if colon else None
        else:
            _refuse(text, place, head, position)
    return _at(
        text,
        (start, stop),
        Stage,
        count=count,
        schedule=schedule,
        argument=argument,
        policies=tuple(policies),
    )


def _argument(text: str, place: tuple[int, int], digits: str) -> int:
    if not _NUMBER.fullmatch(digits):
        word = text[place[0] : place[1]].partition(":")[0]
        given = repr(digits) if digits else "nothing"
        raise _error(text, place, f"after {word}: stands a whole number, not {given}")
    return int(digits)


def _refuse(text: str, place: tuple[int, int], head: str, position: int):
    """Raises for an unknown word, or a schedule in the place of a policy."""
    if position > 0 and head in words.SCHEDULES:
        raise _error(
            text,
            place,
            f"{head!r} is a schedule and stands first in its stage; after '+' come policies: "
            f"{', '.join(words.POLICIES)}; stages are joined by '/'",
        )
    valid = [*words.SCHEDULES, *words.POLICIES] if position == 0 else list(words.POLICIES)
    kind = "schedule or policy" if position == 0 else "policy"
    what = f"{head!r} is not a {kind}" if head else f"an empty {kind}"
    guesses = [*valid, _GRAPH] if text[: place[1]].startswith(f"{head}:") else valid
    raise _error(text, place, f"{what}{nearest(head, guesses)}; valid: {', '.join(valid)}")


def _at(text: str, place: tuple[int, int], make, **fields):
    """Returns `make(**fields)`; adds the place in the text to its `PlanError`."""
    try:
        return make(**fields)
    except PlanError as error:
        raise _error(text, place, str(error)) from None


def _error(text: str, place: tuple[int, int], message: str) -> PlanError:
    return PlanError(f"plan {mark(text, *place)!r}: {message}")
