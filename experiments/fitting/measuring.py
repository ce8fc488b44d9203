"""Measures configurations for targets, several at once, and finds the largest size that fits."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from experiments.config import ConfigError, TrainConfig
from experiments.fitting.row import FitRow
from experiments.fitting.waiting import Waiting
from experiments.training.build import build, entry_of
from experiments.training.choose_plan import choose, host_limit_bytes, leaner, limit_bytes, planned
from jaxckpt.absent import launch
from jaxckpt.absent.jobs import measure_entry
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.models.mesh import MeshShape
from jaxckpt.planner.result import BudgetError, Compilation, FitResult
from jaxckpt.targets.target import parse_target

# Sequence lengths are multiples of the attention kernels' blocks.
_SEQUENCE_UNIT = 128


def check_targets(targets: Sequence[str], mesh: MeshShape | None = None):
    """Checks targets before anything is compiled.

    Args:
      targets: The names of targets.
      mesh: The mesh of the configuration; None for a configuration without a mesh.

    Raises:
      TargetError: A target does not exist.
      MeshError: The mesh and a target have different numbers of devices.
      Unavailable: A target's compiler is not installed.
    """
    for target in map(parse_target, targets):
        if target.backend != "local":
            if mesh is not None:
                mesh.check_devices(target.num_devices, f"target {target}")
            launch.check_available(target)


def measure_all(
    cases: Sequence[tuple[TrainConfig, str]],
    *,
    largest: str | None = None,
    parallel: int = 2,
    done: Callable[[FitRow], Any] = lambda row: None,
) -> list[FitRow]:
    """Returns a row for each configuration and target, in their order.

    Args:
      cases: Pairs of a configuration and a target's name.
      largest: `"batch-size"` or `"seq-len"` to find the largest size that fits; None for the size
        of the configuration.
      parallel: The number of compilations at once. For `local`, this process compiles one step
        after another.
      done: Called with each row when it is done, by the thread that made the row.
    """
    here = threading.Lock()  # tracing two steps at once is no faster than one after another
    with Waiting(len(cases), parallel) as waiting:

        def work(case: tuple[TrainConfig, str]) -> FitRow:
            config, target = case
            with waiting.row(f"{config.remat} on {target}") as compiling:
                row = _row(config, target, largest, _Compiler(here, compiling, waiting.say))
            if row.error is None or not launch.is_stopped():
                waiting.done(row)
                done(row)  # in this thread: the caller may be interrupted
            return row

        return launch.in_parallel(work, cases, parallel)


@dataclasses.dataclass(frozen=True)
class _Compiler:
    """Compiles the steps of a row.

    Attributes:
      here: A lock that is held while this process compiles.
      compiling: Shows the name of the running compilation.
      say: Prints a line that stays on the screen.
    """

    here: threading.Lock
    compiling: Callable[[str], None]
    say: Callable[[str], None]

    def choose(self, config: TrainConfig, target: str, budget: int | None = None) -> FitResult:
        """Returns the planner's answer."""

        def progress(one: Compilation):
            if one.is_done:
                self.say(f"{config.remat} on {target}, {one}")
            self.compiling(one.live.removeprefix("compiling "))

        with self.here if _is_local(target) else contextlib.nullcontext():
            return choose(config, target, budget=budget, progress=progress)

    def measure(self, config: TrainConfig, target: str, what: str = "") -> MemoryReport:
        """Returns the memory of a configuration's step.

        Args:
          config: The configuration.
          target: The target's name.
          what: The name that is shown while the step is compiled.
        """
        with self.here if _is_local(target) else contextlib.nullcontext():
            self.compiling(what)
            return _measure(config, target)


def _measure(config: TrainConfig, target: str) -> MemoryReport:
    if not _is_local(target):
        return measure_entry(entry_of(config, target), target)
    from jaxckpt.memory.measure import compile_step

    return compile_step(build(config, target))[1]


def _is_local(target: str) -> bool:
    return parse_target(target).backend == "local"


def _row(config: TrainConfig, target: str, largest: str | None, compiler: _Compiler) -> FitRow:
    asked = {"config": config, "target": target}
    try:
        asked["budget_bytes"] = limit_bytes(config, target)
        asked["host_budget_bytes"] = host_limit_bytes(config)
        if largest is not None:
            return _largest_row(FitRow(**asked), largest, compiler)
        if config.is_auto:
            chosen = planned(config, lambda one: compiler.choose(one, target))
            return _auto_row(FitRow(**asked), chosen)
        return FitRow(**asked, report=compiler.measure(config, target))
    except Exception as error:  # an error of one row must not stop the others
        return FitRow(**asked, failure=error)


def _auto_row(row: FitRow, chosen: tuple[TrainConfig, FitResult]) -> FitRow:
    config, result = chosen
    return dataclasses.replace(row, config=config, report=result.report, auto=result)


def _largest_row(row: FitRow, largest: str, compiler: _Compiler) -> FitRow:
    """Returns the row of the largest size that fits; this and the next size are compiled."""
    config, field = row.config, largest.replace("-", "_")
    parts = 1 if config.mesh_shape is None else config.mesh_shape.batch_parts
    unit = config.accumulate * parts if field == "batch_size" else _SEQUENCE_UNIT
    start = max(1, getattr(config, field) // unit)

    def sized(count: int) -> FitRow:
        config = dataclasses.replace(row.config, **{field: count * unit})
        return dataclasses.replace(row, config=config, size=count * unit)

    if config.is_auto:
        ways = leaner if field == "seq_len" else lambda config: [config]
        return _largest_auto(sized, start, ways, compiler)
    rows: dict[int, FitRow] = {}

    def peak(count: int) -> tuple[int, int | None]:
        one = sized(count)
        report = compiler.measure(one.config, one.target, f"{largest} {one.size}")
        rows[count] = one = dataclasses.replace(one, report=report)
        return report.peak_bytes, one.limit_bytes

    count = largest_that_fits(peak, start=start)
    # If no size fits, the row of the least size shows how much is missing.
    return dataclasses.replace(rows[max(count, 1)], size=count * unit)


def _largest_auto(
    sized: Callable[[int], FitRow],
    start: int,
    ways: Callable[[TrainConfig], list[TrainConfig]],
    compiler: _Compiler,
) -> FitRow:
    """Returns the row of the largest size for which a plan fits, with the fastest such plan.

    First, the largest size is searched under the plan with the least peak and the configuration
    that needs the least memory. Then the planner is asked for this size and for the next size, with
    the first configuration that fits.

    Args:
      sized: Returns the row of a size, without a report.
      start: The first size to try.
      ways: Returns the given configuration, then variants of it that need less memory.
      compiler: Compiles steps.
    """

    def leanest(row: FitRow) -> FitRow:
        return dataclasses.replace(row, config=ways(row.config)[-1])

    least = _least_plan(leanest(sized(start)), compiler)

    def peak_of(row: FitRow) -> int:
        config = dataclasses.replace(row.config, remat=least)
        what = f"size {row.size} under {least}"
        return compiler.measure(config, row.target, what).peak_bytes

    def peak(count: int) -> tuple[int, int | None]:
        return peak_of(leanest(sized(count))), sized(count).budget_bytes

    def plan(count: int) -> tuple[TrainConfig, FitResult] | None:
        row = sized(count)
        *others, last = ways(row.config)
        for config in (*others, last):
            one = dataclasses.replace(row, config=config)
            if config is not last and peak_of(one) > (row.budget_bytes or 0):
                continue  # even the plan with the least peak does not fit this configuration
            with contextlib.suppress(BudgetError):
                result = compiler.choose(config, row.target)
                return dataclasses.replace(config, remat=str(result.plan)), result
        return None

    count, chosen = grown(plan, largest_that_fits(peak, start=start))
    if chosen is not None:
        return _auto_row(sized(count), chosen)
    # No plan fits the least size. The row shows the plan with the least peak at this size.
    row = sized(1)
    config = dataclasses.replace(row.config, remat=_least_plan(row, compiler))
    report = compiler.measure(config, row.target)
    return dataclasses.replace(row, config=config, report=report, size=0)


def _least_plan(row: FitRow, compiler: _Compiler) -> str:
    """Returns the plan with the least peak; the planner names it if no plan fits."""
    try:
        return str(compiler.choose(row.config, row.target, budget=1).plan)
    except BudgetError as error:
        return str(error.plan)


Answer = TypeVar("Answer")
_MOST_GROWTH = 8  # the largest factor between two sizes that are tried one after another
_MOST = 1 << 20


def largest_that_fits(peak: Callable[[int], tuple[int, int | None]], *, start: int = 1) -> int:
    """Returns the largest size that fits; 0 if size 1 does not fit.

    The peak of a step is nearly linear in the batch size and the sequence length. So the next size
    to try is where the line through two sizes meets the limit. The result is verified: it fits, and
    the next size does not. Peaks are assumed to grow with the size.

    Args:
      peak: Returns `(peak_bytes, usable_bytes)` of a size.
      start: The first size to try.

    Raises:
      ConfigError: The usable bytes of the device are unknown.
    """
    seen: dict[int, int] = {}
    fits, fails, size = 0, None, start
    while True:
        seen[size], usable = peak(size)
        if usable is None:
            raise ConfigError(
                "--max needs a target that says what it can use; name one, such as v5e-1 or "
                "h100, or give a --budget"
            )
        if seen[size] <= usable:
            fits = max(fits, size)
        else:
            fails = size if fails is None else min(fails, size)
        if fails == fits + 1 or fits >= _MOST:
            return fits
        size = _next(seen, usable, fits, fails)


def grown(plan: Callable[[int], Answer | None], count: int) -> tuple[int, Answer | None]:
    """Returns the largest size for which `plan` has an answer, and the answer.

    Args:
      plan: Returns the answer for a size; None if no plan fits.
      count: The size at which the search begins, likely the largest; 0 if unknown.
    """
    found, last = None, count
    while last > 0 and (found := plan(last)) is None:
        last -= 1
    if last < count:
        return last, found
    while (more := plan(last + 1)) is not None:
        last, found = last + 1, more
    return last, found


def _next(seen: dict[int, int], usable: int, fits: int, fails: int | None) -> int:
    """Returns the next size to try.

    Args:
      seen: The peaks of the sizes tried so far, in bytes.
      usable: The bytes that a step may use.
      fits: The largest size that fits; 0 if no size is known to fit.
      fails: The least size that does not fit; None if every size tried so far fits.
    """
    guess = _on_the_line(seen, usable)
    if guess is None:
        guess = 2 * fits if fails is None else fails // 2
    highest = fits * _MOST_GROWTH if fails is None else fails - 1
    guess = min(max(guess, fits + 1), highest)
    if len(seen) > 8 and fails is not None:  # peaks are not linear in the size after all
        guess = (fits + fails) // 2
    return guess


def _on_the_line(seen: dict[int, int], usable: int) -> int | None:
    """Returns the size at which a line through the two sizes nearest to the limit meets the limit.

    Returns None if fewer than two sizes were tried, or if the line does not rise.
    """
    if len(seen) < 2:
        return None
    (one, low), (two, high) = sorted(seen.items(), key=lambda item: abs(item[1] - usable))[:2]
    slope = (high - low) / (two - one)
    return None if slope <= 0 else int(one + (usable - low) / slope)
