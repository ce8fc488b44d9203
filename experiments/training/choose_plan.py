"""The plan `auto` of a configuration: the planner chooses a plan for the whole training step.

    result = choose(config, "v5e-1")     # config.remat is auto, config.budget says how much
    config = dataclasses.replace(config, remat=str(result.plan))

Optimizer, donation, accumulation, loss head and frozen parameters are part of the step. So they are
part of the peak that is compared with the budget. Reports of compiled steps are kept on disk, both
for absent targets and for this process's device.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.config import ConfigError, TrainConfig
from experiments.files import versions
from experiments.training.build import build, plan_entry
from experiments.training.display import Display
from jaxckpt.absent.jobs import Entry
from jaxckpt.compiled import cache
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.planner.absent import fit_entry
from jaxckpt.planner.budgets import check_asked, given_bytes, host_bytes, more_than_usable
from jaxckpt.planner.result import BudgetError, Compilation, FitResult
from jaxckpt.plans import Plan
from jaxckpt.targets.present import usable_bytes
from jaxckpt.targets.target import LOCAL, parse_target
from jaxckpt.units import iec, unit_of


def choose(
    config: TrainConfig,
    target: str,
    *,
    budget: int | None = None,
    progress: Callable[[Compilation], Any] | None = None,
) -> FitResult:
    """Returns the fastest plan for a configuration's step within a budget.

    Args:
      config: The configuration; its plan is not read.
      target: `"local"`, or the name of a chip, which may be absent.
      budget: The budget in bytes; by default the budget of the configuration.
      progress: As for `jaxckpt.fit`.

    Returns:
      The plan, its memory report and the other candidates.

    Raises:
      BudgetError: No plan fits.
      ConfigError: The budget is not known, or the planner's solver is not installed.
    """
    budget = limit_bytes(config, target) if budget is None else budget
    num_blocks = config.model.num_blocks
    try:
        check_asked(num_blocks)
    except ImportError as error:
        raise ConfigError(f"plan 'auto': {error}") from None
    asked: dict[str, Any] = {"budget": budget, "host_budget": host_limit_bytes(config) or 0}
    asked["progress"] = progress
    entry, unit = plan_entry(config, target), unit_of(config.budget or "")
    try:
        result = _chosen(config, target, entry, num_blocks, **asked)
    except BudgetError as error:
        raise error.replaced(unit=unit) from None
    return dataclasses.replace(result, unit=unit)


def _chosen(
    config: TrainConfig, target: str, entry: Entry, num_blocks: int, **asked: Any
) -> FitResult:
    """Returns the planner's answer; a known answer is read from disk."""
    if parse_target(target).backend != "local":
        return fit_entry(entry, num_blocks=num_blocks, target=target, **asked)
    sources = cache.digest_of_sources({"jaxckpt", "experiments"})
    about = {"entry": entry.as_json(), "calibrate": config.calibrate, "sources": sources}
    budgets = {name: asked[name] for name in ("budget", "host_budget")}
    name = cache.key(answer=about | budgets, **cache.here())
    with contextlib.suppress(KeyError, TypeError, ValueError):  # the file is missing or incomplete
        return FitResult.from_json(cache.load_json(name))
    result = _solved(config, num_blocks, **asked)
    cache.store_json(name, result.as_json())
    return result


def _solved(config: TrainConfig, num_blocks: int, **asked: Any) -> FitResult:
    """Returns the planner's answer for this process's device."""
    from jaxckpt.costs.roofline import rates_of
    from jaxckpt.memory.built_step import block_findings
    from jaxckpt.memory.measure import job_of_step
    from jaxckpt.planner.fit import solve
    from jaxckpt.planner.steps import Steps

    built = lambda plan: build(dataclasses.replace(config, remat=str(plan)), "local")

    def report_of(plan: Plan):
        """Returns the report of a step compiled as in training, without findings of its block."""
        step = dataclasses.replace(built(plan), block=None)
        options = {"donated": step.donate_argnums, "xla": dict(step.compiler_options)}
        return steps.kept(plan, job_of_step(step), step.args, options=options)

    steps = Steps.of_built(built, LOCAL, report_of)
    result = solve(steps, num_blocks, target=LOCAL, calibrate=config.calibrate, **asked)
    # These findings take several traces of a block, so only the chosen plan's report has them.
    found = block_findings(built(result.plan), result.report, rates_of(LOCAL))
    findings = (*result.report.findings, *map(str, found))
    return dataclasses.replace(result, report=dataclasses.replace(result.report, findings=findings))


# The tokens of one tile of the MLP. The hidden values of so many tokens are small compared with the
# values of a long sequence.
_TILE_TOKENS = 4096


def in_tiles(config: TrainConfig) -> TrainConfig:
    """Returns a configuration whose MLP runs in tiles.

    The configuration is returned unchanged if it has tiles already, or if a sequence is one tile.
    """
    tiles = -(-config.seq_len // _TILE_TOKENS)
    if config.model.mlp_tiles > 1 or tiles == 1:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, mlp_tiles=tiles))


def leaner(config: TrainConfig) -> list[TrainConfig]:
    """Returns a configuration, then variants of it that need less memory, the leanest last.

    In the first variant the MLP runs in tiles. In the second variant, blocks are also updated in
    the backward pass. The second variant is left out if the configuration does not allow this.
    """
    found = [config, in_tiles(config)]
    with contextlib.suppress(ConfigError):
        found.append(dataclasses.replace(found[-1], update_in_backward=True))
    return list(dict.fromkeys(found))


def planned(
    config: TrainConfig, ask: Callable[[TrainConfig], FitResult]
) -> tuple[TrainConfig, FitResult]:
    """Returns a configuration with its plan, and the planner's answer.

    If no plan fits, the values of one block may set the peak, which a plan does not change. So the
    planner is asked again with the MLP of a long sequence in tiles.

    Args:
      config: The configuration; its plan is not read.
      ask: Returns the planner's answer for a configuration.

    Raises:
      BudgetError: No plan fits, with tiles or without. The error names the smaller least budget.
    """
    try:
        result = ask(config)
    except BudgetError as whole:
        tiled = in_tiles(config)
        if tiled == config:
            raise
        try:
            config, result = tiled, ask(tiled)
        except BudgetError as error:
            raise min(error, whole, key=lambda one: one.least_bytes) from None
    return dataclasses.replace(config, remat=str(result.plan)), result


def check_calibrated(config: TrainConfig, plans: Sequence[Plan], targets: Sequence[str]):
    """Checks the option `calibrate` of a configuration.

    Args:
      config: The configuration.
      plans: All plans that are asked for.
      targets: The names of all targets that are asked for.

    Raises:
      ConfigError: `calibrate` is given, but no plan is `auto`, or a target is absent.
    """
    if not config.calibrate:
        return
    if not any(stage.schedule == "auto" for plan in plans for stage in plan.stages):
        raise ConfigError("--calibrate times a block for the planner: it is of plan 'auto' alone")
    away = [target for target in targets if parse_target(target).backend != "local"]
    if away:
        raise ConfigError(f"--calibrate times a block on this machine's chip; {away[0]} is not it")


def limit_bytes(config: TrainConfig, target: str) -> int | None:
    """Returns a configuration's budget in bytes; None for a configuration without a budget.

    Args:
      config: The configuration.
      target: The name of the target whose memory the budget `auto` stands for.

    Raises:
      ConfigError: The budget is `auto`, and the usable bytes of the device are unknown.
    """
    if config.budget is None:
        return None
    if config.budget != "auto":
        return given_bytes(config.budget)
    usable = usable_bytes(parse_target(target))
    if usable is None:
        raise ConfigError(
            f"--budget=auto is all that a device can use, which {target} does not tell; give "
            "bytes, such as --budget=15GiB"
        )
    return usable


def host_limit_bytes(config: TrainConfig) -> int | None:
    """Returns the bytes that a configuration's plan may keep on the host; None if unset."""
    return None if config.host_budget is None else host_bytes(config.host_budget)


def excess(limit: int | None, target: str) -> str | None:
    """Returns a line of text if a budget is more than a program may fill on a target, else None."""
    return None if limit is None else more_than_usable(limit, parse_target(target))


def check_within(
    config: TrainConfig, report: MemoryReport, limit: int | None, host_limit: int | None
):
    """Checks that a step is within the budgets of the device and the host.

    Args:
      config: The configuration of the step.
      report: The memory report of the step.
      limit: The budget of a device in bytes; None for no budget.
      host_limit: The budget of the host in bytes; None for no budget.

    Raises:
      ConfigError: The step needs more than a budget.
    """
    needs = ((report.peak_bytes, limit, ""), (report.host_bytes, host_limit, "host "))
    for size, most, where in needs:
        if most is not None and size > most:
            raise ConfigError(
                f"plan {config.remat!r} needs {iec(size)} compiled, {iec(size - most)} more than "
                f"the {where}budget of {iec(most)}; --remat=auto looks for a plan within it"
            )


# Settings that change a step's memory and that a resumed run may change. A resumed run cannot
# change the settings of `checkpoints.identity`.
_OF_MEMORY = ("accumulate", "unroll", "loss_chunk_tokens", "update_in_backward")


def settle(
    config: TrainConfig,
    limit: int | None,
    about: Mapping[str, Any] | None,
    display: Display,
) -> tuple[TrainConfig, dict[str, Any] | None]:
    """Returns a run's configuration with the planner's plan for this device in place of `auto`.

    A resumed run keeps its plan if its budget, device, versions and settings of memory are
    unchanged. Otherwise the planner chooses a new plan. The returned configuration has no budget,
    so the configuration repeats the run without the planner.

    Args:
      config: The run's configuration.
      limit: The budget in bytes.
      about: The JSON values of the checkpoint that the run resumes; None for a new run.
      display: Shows the compilations.

    Returns:
      The configuration, and the conditions under which its plan was chosen, as JSON values; None if
      the user named the plan.
    """
    if not config.is_auto:
        return config, None
    assert limit is not None  # `auto` has a budget
    now = _occasion(config, limit)
    if about is not None and about.get("planned_for") == now:
        before = about["config"]
        tiles = before["model"].get("mlp_tiles", config.model.mlp_tiles)
        model = dataclasses.replace(config.model, mlp_tiles=tiles)
        config = dataclasses.replace(config, remat=before["remat"], model=model)
        display.print(f"plan    {config.remat}, as before; another --budget plans anew")
    else:
        display.print(f"plan    looked for within {iec(limit)}")
        started = time.perf_counter()
        with display.waiting("tracing the step") as waiting:

            def tell(one: Compilation):
                if one.is_done:
                    display.print(f"        {one}")
                waiting.update(one.live or "choosing among plans")

            asked, ask = config, lambda one: choose(one, "local", budget=limit, progress=tell)
            config, result = planned(config, ask)
        display.print(str(result) if config.explain else result.summary)
        display.print(
            f"planned in {time.perf_counter() - started:.1f} s; {result.num_compiles} plans were "
            "compiled, or read from disk"
        )
        if config.model.mlp_tiles != asked.model.mlp_tiles:
            display.print(
                f"model   the MLP runs in {config.model.mlp_tiles} tiles: whole, no plan fits"
            )
    done = {"budget": None, "host_budget": None, "calibrate": False}
    return dataclasses.replace(config, **done), now


def _occasion(config: TrainConfig, limit: int) -> dict[str, Any]:
    import jax

    found = {name: getattr(config, name) for name in (*_OF_MEMORY, "calibrate")}
    found |= {"budget_bytes": limit, "host_budget_bytes": host_limit_bytes(config)}
    found |= {"device": jax.devices()[0].device_kind}
    return found | {name: versions()[name] for name in ("jax", "jaxlib")}
