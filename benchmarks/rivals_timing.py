"""Many programs of one step, timed in turns on one state that goes through all of them.

A round is one turn of each program, every other round in reverse order, so that a chip that warms
up or slows down does so for all alike. A turn begins with a step that is not timed: it waits for
what the program before it left, and loads the kernels. The first round is not timed at all.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from benchmarks.rivals_programs import Program

Seconds = dict[Program, list[float]]
_LEAST_ROUNDS = 3


class Turns:
    """Takes turns.

    Attributes:
      seconds: A step's, by program, one entry a round.
      errors: Of programs that failed when they were run; they have no more turns.
    """

    def __init__(self, programs: Sequence[Program], make_state: Callable[[], Any], tokens):
        """Takes compiled programs, what makes their state, and a batch."""
        self._programs = list(programs)
        self._make_state, self._tokens = make_state, tokens
        self._state: Any = make_state()
        self.seconds: Seconds = {program: [] for program in programs}
        self.errors: dict[Program, Exception] = {}

    def rounds(self, count: int, steps: int, until: float | None = None) -> Iterator[int]:
        """Yields the number of rounds so far after each.

        Args:
          count: How many.
          steps: Timed in a turn.
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
        self._step(program)
        jax.block_until_ready(self._state)
        started = time.perf_counter()
        for _ in range(steps):
            self._step(program)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - started) / steps

    def _step(self, program: Program):
        self._state, _ = program.compiled(self._state, self._tokens)
