"""The planner for a step that is built in the process that compiles it. No JAX import.

    step = Entry(function="experiments.training.build:built_step", arguments={...})
    print(fit_entry(step, num_blocks=28, target="h100", budget="70GiB"))

`jaxckpt.fit` traces a step where it is called. A step that cannot be traced there (cuDNN's
attention looks for its chip) or handed to another process is planned by one fresh process that
builds it for each plan (`worker.py`). The answer is kept on disk, and so is every report, under the
name that `measure_entry` gives it: a plan that either has compiled is not compiled again.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxckpt.absent import launch
from jaxckpt.absent.jobs import Entry, entry_key
from jaxckpt.compiled import cache
from jaxckpt.planner.budgets import budget_bytes, check_asked, host_bytes
from jaxckpt.planner.result import BudgetError, Compilation, FitResult
from jaxckpt.targets.target import Target, TargetError, parse_target


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
      entry: A step without its plan: the function is called with `plan="sqrt"`, say, beside the
        entry's arguments; for several stacks with texts by name, `plan={"encoder": "sqrt", ...}`.
      num_blocks: As for `jaxckpt.fit`.
      target: An absent chip.
      budget: As for `jaxckpt.fit`.
      host_budget: As for `jaxckpt.fit`.
      progress: As for `jaxckpt.fit`.

    Raises:
      BudgetError, ValueError, ImportError: As from `jaxckpt.fit`.
      TargetError: There is no such target, or it is `local`.
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
    name = entry_key(entry, target, **asked)
    found = _answer(cache.load_json(name))
    if found is None:
        launch.check_available(target)
        job = {"entry": entry.as_json(), "target": target.name, **asked}
        say = None if progress is None else lambda values: progress(Compilation(**values))
        values = launch.run_module("jaxckpt.planner.worker", job, b"", target, say)
        cache.store_json(name, values)
        found = _answer(values)
    if isinstance(found, BudgetError):
        raise found
    assert found is not None  # a worker that fails raises
    return found


def _answer(values: Any) -> FitResult | BudgetError | None:
    """Returns what a worker left; None if the values are none, or not whole."""
    try:
        if "infeasible" in values:
            return BudgetError.from_json(values["infeasible"])
        return FitResult.from_json(values["result"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
