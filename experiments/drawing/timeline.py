"""A plan as a timeline: which block runs when, and how long carries and residuals are held.

A timeline shows one step of a stack under a loss: the forward parts of all stages in order, then
their backward parts from the last stage to the first. A block's forward pass takes one unit of
time, its backward pass two. Policies are about values inside a block and are not drawn;
`policy_words` describes them.
`as_text` draws a timeline as text, `figure.py` as a figure.
"""

import dataclasses
import textwrap
from collections.abc import Iterator

from experiments.config import ConfigError
from jaxckpt.plans import Plan, Policy, Stage, words
from jaxckpt.schedules.actions import Advance, Free, Load, Record, Reverse, Store
from jaxckpt.schedules.of_stage import stack_schedule_of, under_loss
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.schedules.segments import uniform

FORWARD, RECOMPUTE, BACKWARD = "forward", "recompute", "backward"
CARRY, RESIDUALS = "carry", "residuals"
BACKWARD_TIME = 2
# A picture of more is a wall of colour, and takes minutes.
MOST_RUNS = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """One block over a stretch of time.

    Attributes:
      block: The block's number; for a carry, the number of the block that reads the carry.
      start: The time at which the span begins.
      stop: The time at which the span ends.
      kind: `FORWARD`, `RECOMPUTE` or `BACKWARD` for a run, `CARRY` or `RESIDUALS` for a held value.
    """

    block: int
    start: int
    stop: int
    kind: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """The runs of a step's blocks, and the values that are held.

    Attributes:
      plan: The plan, bound to the number of blocks.
      runs: Blocks that run, in order.
      held: Carries and residuals that wait for the backward pass.
      loss_time: The time at which the forward pass ends.
      extra_forwards: The number of recomputed block forwards, summed over the stages' schedules.
      peak_slots: The largest number of slots in use at once, over all stages together.
    """

    plan: Plan
    runs: tuple[Span, ...]
    held: tuple[Span, ...]
    loss_time: int
    extra_forwards: int
    peak_slots: int

    @property
    def end(self) -> int:
        """The time at which the last block's backward pass ends."""
        return self.runs[-1].stop

    @property
    def evaluations(self) -> int:
        """The number of block forwards that run."""
        return sum(run.kind != BACKWARD for run in self.runs)


def timeline(plan: Plan) -> Timeline:
    """Returns the timeline of a bound plan.

    Raises:
      ConfigError: `auto`, which is no plan yet, or more runs than a picture can show.
    """
    if plan.stages[0].schedule == "auto":
        raise ConfigError(
            "auto has no schedule of its own; draw the plan that it chose, such as sqrt "
            "(python -m experiments.fit --plan auto --budget 15GiB prints it)"
        )
    schedules = [_schedule(stage) for stage in plan.stages]
    forwards = plan.bound_count + sum(one.extra_forwards for one in schedules)
    if forwards > MOST_RUNS:
        raise ConfigError(
            f"plan {str(plan)!r} runs {forwards:,} blocks, a picture shows {MOST_RUNS:,} at most; "
            "take fewer --blocks"
        )
    return _replay(plan, schedules)


def _replay(plan: Plan, schedules: list[Schedule]) -> Timeline:
    recorder, later, offset = _Recorder(plan.bound_count), [], 0
    for schedule in schedules:
        actions = list(schedule.actions)
        loss = next(i for i, action in enumerate(actions) if isinstance(action, Load | Record))
        # A load comes back from the loss; a segment that is recorded first is kept through it.
        loss += isinstance(actions[loss], Record)
        stage = _Stage(recorder, offset)
        stage.run(actions[:loss])
        later.append((stage, actions[loss:]))
        offset += schedule.num_blocks
    loss_time = recorder.now
    for stage, actions in reversed(later):
        stage.run(actions)
    return Timeline(
        plan=plan,
        runs=tuple(recorder.runs),
        held=tuple(recorder.held),
        loss_time=loss_time,
        extra_forwards=sum(one.extra_forwards for one in schedules),
        peak_slots=recorder.peak_slots,
    )


def _schedule(stage: Stage) -> Schedule:
    """Returns the schedule of any stage, also of `none` and `full`."""
    if stage.schedule == "none":
        return uniform(stage.bound_count, 1)
    if stage.schedule == "full":
        return under_loss(uniform(stage.bound_count, stage.bound_count))
    schedule = stack_schedule_of(stage)
    assert schedule is not None, stage
    return schedule


class _Recorder:
    """The clock and what has been drawn, shared by the stages of a plan."""

    def __init__(self, num_blocks: int):
        self.now = 0
        self.runs: list[Span] = []
        self.held: list[Span] = []
        self.seen = [False] * num_blocks
        self.slots_in_use = self.peak_slots = 0

    def run(self, block: int, kind: str, time: int):
        self.runs.append(Span(block=block, start=self.now, stop=self.now + time, kind=kind))
        self.now += time

    def hold(self, block: int, since: int, kind: str):
        """Notes that a block's value was held since a time until now."""
        if self.now > since:
            self.held.append(Span(block=block, start=since, stop=self.now, kind=kind))


class _Stage:
    """Replays one stage's actions at its place in the stack."""

    def __init__(self, recorder: _Recorder, offset: int):
        self.recorder, self.offset = recorder, offset
        self.current = offset
        self.slots: dict[int, tuple[int, int]] = {}  # slot -> the carry it holds, since when
        self.recorded: dict[int, int] = {}  # block -> since when its residuals are held

    def run(self, actions: list):
        """Replays actions; they are legal, as the schedules of stages are."""
        recorder = self.recorder
        for action in actions:
            match action:
                case Store(slot):
                    self.slots[slot] = self.current, recorder.now
                    recorder.slots_in_use += 1
                    recorder.peak_slots = max(recorder.peak_slots, recorder.slots_in_use)
                case Load(slot):
                    self.current = self.slots[slot][0]
                case Free(slot):
                    recorder.hold(*self.slots.pop(slot), CARRY)
                    recorder.slots_in_use -= 1
                case Advance(start, stop) | Record(start, stop):
                    for block in range(self.offset + start, self.offset + stop):
                        recorder.run(block, RECOMPUTE if recorder.seen[block] else FORWARD, 1)
                        recorder.seen[block] = True
                        if isinstance(action, Record):
                            self.recorded[block] = recorder.now
                    self.current = self.offset + stop
                case Reverse(block):
                    block += self.offset
                    recorder.hold(block, self.recorded.pop(block), RESIDUALS)
                    recorder.run(block, BACKWARD, BACKWARD_TIME)


def title(line: Timeline) -> str:
    """Returns the title of a picture: the plan as people write it, and the number of blocks."""
    blocks = line.plan.bound_count
    return f"{line.plan.written} on {blocks} block{'s' * (blocks > 1)}"


def counts(line: Timeline) -> str:
    """Returns the counts below a picture, as text."""
    blocks, again = line.plan.bound_count, line.extra_forwards
    return (
        f"evaluations {line.evaluations} ({blocks} + {again} extra forwards); "
        f"peak slots {line.peak_slots}"
    )


def policy_words(plan: Plan) -> Iterator[str]:
    """Yields a sentence for each stage that has policies, which pictures do not draw."""
    first = 0
    for stage in plan.stages:
        if stage.policies:
            kept = "; ".join(map(_policy_text, stage.policies))
            rest = ""  # what happens to the values that no policy keeps
            if stage.inner_policies and stage.schedule == "full":
                rest = "; a recompute runs the rest of the block"
            elif stage.inner_policies:
                rest = "; the rest of a recorded block is run once more in its backward pass, "
                rest += "not drawn"
            yield f"blocks {first} to {first + stage.bound_count - 1}: {kept}{rest}"
        first += stage.bound_count


def _policy_text(policy: Policy) -> str:
    if policy.kind == "offload" and words.CARRY in policy.names:
        return "kept carries wait in pinned host memory"
    names = f" ({', '.join(policy.names)})" if policy.names else ""
    return f"{policy.kind}{names}: {words.POLICIES[policy.kind].meaning}"


# Long and deep pictures are drawn to scale.
_SIGNS = {CARRY: "-", RESIDUALS: "=", FORWARD: "F", RECOMPUTE: "R", BACKWARD: "B"}
_RANK = {sign: rank for rank, sign in enumerate(" " + "".join(_SIGNS.values()))}
_MOST_COLUMNS, _MOST_ROWS = 200, 64
KEY = "F forward  R recompute  B backward  - carry held  = residuals held  | the loss"


def as_text(line: Timeline, width: int | None = None) -> str:
    """Returns the picture, its key, counts and policies, as lines of ASCII text.

    `width` is the number of columns of a line; without it a line is as wide as it needs to be.
    """
    digits = len(str(line.plan.bound_count - 1))
    # The block's number, a blank, and the bar of the loss take columns, too.
    most = _MOST_COLUMNS if width is None else max(1, min(_MOST_COLUMNS, width - digits - 2))
    per_column = -(-line.end // most)
    per_row = -(-line.plan.bound_count // _MOST_ROWS)
    columns, rows = -(-line.end // per_column), -(-line.plan.bound_count // per_row)
    grid = [[" "] * columns for _ in range(rows)]
    for span in (*line.held, *line.runs):
        row = grid[span.block // per_row]
        for column in range(span.start // per_column, (span.stop - 1) // per_column + 1):
            row[column] = max(row[column], _SIGNS[span.kind], key=_RANK.__getitem__)
    loss_column = line.loss_time // per_column
    lines = []
    for number in reversed(range(rows)):
        left, right = grid[number][:loss_column], grid[number][loss_column:]
        text = f"{number * per_row:>{digits}} {''.join(left)}|{''.join(right)}"
        lines.append(text.rstrip())
    notes = [KEY]
    if max(per_column, per_row) > 1:
        units = f"{per_column} unit{'s' * (per_column > 1)} of time"
        notes.append(f"a column is {units}, a row {per_row} block{'s' * (per_row > 1)}")
    notes += [counts(line), *policy_words(line.plan)]
    if width is not None:
        notes = [part for note in notes for part in textwrap.wrap(note, width)]
    return "\n".join([title(line), *lines, *notes])
