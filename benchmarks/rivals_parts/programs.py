"""The programs of one step under many plans: each compiled once, and all timed in turns.

Plans that give the same program share it: `dots` and `dots_no_batch` do, if attention is one
kernel. A plan that cannot be compiled has a program with an error.

All programs run on one train state, which each program hands to the next one. A round is one turn
of each program. Every other round runs in reverse order, so that a chip that warms up or slows down
affects all programs alike. The first step of a turn is not timed: it waits for the previous
program's work and loads the kernels. The first round is not timed at all.
"""

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from experiments.config import TrainConfig
from experiments.training.build import build
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.memory.built_step import BuiltStep
from jaxckpt.memory.measure import compile_step
from jaxckpt.planner.steps import Steps
from jaxckpt.plans import Plan
from jaxckpt.targets.target import LOCAL
from jaxckpt.transforms.traced_block import text_of


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A compiled step.

    Attributes:
      plan: The first plan that gave this program.
      compiled: A function of state and batch; None after an error.
      report: The compiler's report; None after an error.
      seconds: The seconds of building and compiling the step.
      failure: The error of building or compiling; None after success.
    """

    plan: str
    compiled: Any = None
    report: MemoryReport | None = None
    seconds: float
    failure: Exception | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns the compiler's figures, or the error, as JSON values."""
        if self.report is None:
            return failed(self.failure)
        names = ("peak_bytes", "host_bytes", "recomputed_flops", "estimated_seconds")
        found = {name: getattr(self.report, name) for name in names}
        return found | {"compile_seconds": self.seconds, "program_of": self.plan}


class Programs:
    """Compiles a configuration's step under plans, as a run of each plan would.

    Attributes:
      steps: The planner's view of the programs.
    """

    def __init__(self, config: TrainConfig):
        self._config = config
        self._by_plan: dict[str, Program] = {}
        self._by_text: dict[str, Program] = {}
        self.steps = Steps.of_built(self._built, LOCAL, self._report_of)

    @property
    def made(self) -> list[Program]:
        """Every program, in the order of compiling."""
        return list(self._by_text.values())

    def of(self, plan: str) -> Program:
        """Returns the program of a plan."""
        if plan in self._by_plan:
            return self._by_plan[plan]
        started, text = time.perf_counter(), None
        try:
            text = text_of(self.steps.trace(Plan.parse(plan)).jaxpr)
            if text in self._by_text:
                return self._by_plan.setdefault(plan, self._by_text[text])
            compiled, report = compile_step(self._built(Plan.parse(plan)))
            found: dict[str, Any] = {"compiled": compiled, "report": report}
        except (ValueError, RuntimeError) as error:
            found = {"failure": error}
        made = Program(plan=plan, seconds=time.perf_counter() - started, **found)
        made = made if text is None else self._by_text.setdefault(text, made)
        return self._by_plan.setdefault(plan, made)

    def _built(self, plan: Plan) -> BuiltStep:
        return build(dataclasses.replace(self._config, remat=str(plan)), "local")

    def _report_of(self, plan: Plan) -> MemoryReport:
        program = self.of(str(plan))
        if program.report is None:
            raise RuntimeError(f"{plan}: {failed(program.failure)['error']}") from program.failure
        return program.report


def failed(error: Exception | None) -> dict[str, str]:
    """Returns the first line of an error's text, and its traceback, for a record."""
    assert error is not None  # a program without a report has an error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return {"error": lines[0], "traceback": "".join(traceback.format_exception(error))}


_LEAST_ROUNDS = 3


class Turns:
    """Runs programs in turns.

    Attributes:
      seconds: The seconds of a step, by program, one entry a round.
      errors: The errors of programs that failed in a turn; they have no more turns.
    """

    def __init__(self, programs: Sequence[Program], make_state: Callable[[], Any], tokens):
        """Takes compiled programs, a function that returns a new train state, and a batch."""
        self._programs = list(programs)
        self._make_state, self._tokens = make_state, tokens
        self._state: Any = make_state()
        self.seconds: dict[Program, list[float]] = {program: [] for program in programs}
        self.errors: dict[Program, Exception] = {}

    def rounds(self, count: int, steps: int, until: float | None = None) -> Iterator[int]:
        """Yields the number of finished rounds after each.

        Args:
          count: The number of rounds.
          steps: The timed steps of a turn.
          until: Time of `time.monotonic` after which no round begins; a few are run anyway.
        """
        self._round(steps=1)
        for found in self.seconds.values():
            found.clear()
        for number in range(1, count + 1):
            started = time.monotonic()
            self._round(steps, is_reverse=number % 2 == 0)
            yield number
            ended = time.monotonic()
            is_late = until is not None and ended + (ended - started) > until
            if is_late and number >= _LEAST_ROUNDS:
                return

    def _round(self, steps: int, is_reverse: bool = False):
        for program in reversed(self._programs) if is_reverse else list(self._programs):
            try:
                self.seconds[program].append(self._turn(program, steps))
                continue
            except RuntimeError as error:  # out of memory, for one
                self.errors[program] = error
            # A step that fails may have taken the state with it.
            self._programs = [one for one in self._programs if one is not program]
            self._state = None
            self._state = self._make_state()

    def _turn(self, program: Program, steps: int) -> float:
        started = 0.0
        for number in range(steps + 1):
            self._state, _ = program.compiled(self._state, self._tokens)
            if number == 0:  # not timed
                jax.block_until_ready(self._state)
                started = time.perf_counter()
        jax.block_until_ready(self._state)
        return (time.perf_counter() - started) / steps
