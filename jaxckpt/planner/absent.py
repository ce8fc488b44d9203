"""`fit` for an absent chip; the process that compiles a step also builds it.

    step = Entry(function="experiments.training.build:built_step", arguments={...})
    print(fit_entry(step, num_blocks=28, target="h100", budget="70GiB"))

`jaxckpt.fit` traces a step in its own process. Some steps cannot be traced there, because cuDNN's
attention looks for its chip. Others cannot be handed to another process. For such a step a fresh
process builds the step of each plan (`worker.py`). The answer and all reports are kept on disk.
Reports have the names that `measure_entry` uses, so neither function compiles a plan that the other
has compiled. This module does not import JAX.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxckpt.absent import launch
from jaxckpt.absent.jobs import Entry, entry_key
from jaxckpt.compiled import cache
from jaxckpt.planner.budgets import budget_bytes, check_asked, host_bytes
from jaxckpt.planner.result import BudgetError, Compilation, FitResult
from jaxckpt.targets.target import Target, TargetError, parse_target
from jaxckpt.units import unit_of


def fit_entry(
    entry: Entry,
    *,
    num_blocks: int | Mapping[str, int],
    target: str | Target,
    budget: str | int | float = "auto",
    host_budget: str | int | float = 0,
    progress: Callable[[Compilation], Any] | None = None,
) -> FitResult:
    """Returns the fastest plan of an entry's step whose compiled peak is within a budget.

    Args:
      entry: A step without its plan. Its function gets the entry's own arguments and the plan as
        text: `plan="sqrt"`, or by name for several stacks, `plan={"encoder": "sqrt", ...}`.
      num_blocks: The number of blocks of the stack, or a mapping from stack names to numbers.
      target: An absent chip.
      budget: Bytes per device, such as `"15GiB"`; `"auto"` for all memory that a program may fill.
      host_budget: Bytes of pinned host memory per device that a plan may use.
      progress: Called with a `Compilation` before and after each compilation.

    Returns:
      The plan, its memory report and the other candidates.

    Raises:
      BudgetError: No plan fits.
      ValueError: The budget or `num_blocks` is not valid, or the step ignores its plan.
      ImportError: A package that the planner needs is not installed.
      TargetError: The target is unknown, or it is `local`.
      Unavailable: The target's compiler is not installed.
      WorkerError: The entry or the compiler failed.
    """
    check_asked(num_blocks)
    target = parse_target(target)
    if target.backend == "local":
        raise TargetError("target 'local' is this process's own backend: jaxckpt.fit takes it")
    count = dict(num_blocks) if isinstance(num_blocks, Mapping) else num_blocks
    asked: dict[str, Any] = {"num_blocks": count, "budget": budget_bytes(budget, target)}
    asked["host_budget"] = host_bytes(host_budget)
    name, unit = entry_key(entry, target, **asked), unit_of(budget)
    found = _answer(cache.load_json(name))
    if found is None:
        launch.check_available(target)
        job = {"entry": entry.as_json(), "target": target.name, "unit": unit, **asked}
        say = None if progress is None else lambda values: progress(Compilation(**values))
        values = launch.run_module("jaxckpt.planner.worker", job, b"", target, say)
        cache.store_json(name, values)
        found = _answer(values)
    if isinstance(found, BudgetError):
        raise found.replaced(unit=unit)
    assert found is not None  # a worker that fails has raised
    return dataclasses.replace(found, unit=unit)


def _answer(values: Any) -> FitResult | BudgetError | None:
    """Returns a worker's answer, or None if values are missing or incomplete."""
    try:
        if "infeasible" in values:
            return BudgetError.from_json(values["infeasible"])
        return FitResult.from_json(values["result"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
