"""The process that compiles for an absent chip: `python -m jaxckpt.memory.worker FOLDER`.

`absent/jobs.py` starts this process with the environment that the target's compiler reads when it
is loaded. The process reads `job.json` (and `program.bin`) in the folder and writes `result.json`:
the report, or the error's class, message and traceback. It is not meant to be run by hand. The
planner's worker uses functions of this module.
"""

import dataclasses
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax import export
from jax.experimental import topologies

from jaxckpt.absent.exported import describe, rebuild
from jaxckpt.compiled import peak
from jaxckpt.compiled.cache import write_whole
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.costs.flops import count_flops
from jaxckpt.costs.roofline import Rates
from jaxckpt.memory import workspace
from jaxckpt.memory.built_step import BuiltStep, annotate
from jaxckpt.memory.job import Job
from jaxckpt.plans.errors import UserError
from jaxckpt.targets.gpu_config import target_config
from jaxckpt.targets.target import HOST_GPUS, Target, parse_target
from jaxckpt.transforms.traced_block import on_devices


def main(folder: Path):
    """Compiles the job of a folder and writes the report into the folder."""
    answer(folder, lambda job: {"report": _run(job, folder).as_json()})


def answer(folder: Path, work: Callable[[dict[str, Any]], dict[str, Any]]):
    """Writes the result of `work` on a folder's job; an error also is a result.

    Args:
      folder: The folder with `job.json`, where `result.json` is written.
      work: Returns the result of a job; both are JSON values.
    """
    job = json.loads((folder / "job.json").read_text())
    try:
        result = work(job)
    except Exception as error:  # an entry is the user's code and may raise anything
        found = {"kind": type(error).__name__, "detail": str(error)}
        found |= {"traceback": traceback.format_exc(), "is_users": isinstance(error, UserError)}
        result = {"error": found}
    write_whole(folder / "result.json", json.dumps(result))


def _run(job: dict[str, Any], folder: Path) -> MemoryReport:
    target = parse_target(job["target"])
    topology = get_topology(target)
    if job["entry"] is not None:
        # The topology must exist before the step is traced: cuDNN's attention looks for its chip.
        return measure_built(build_step(**job["entry"]), target, topology)
    exported = export.deserialize(bytearray((folder / "program.bin").read_bytes()))
    shardings = rebuild(job["placement"], topology, target, exported.nr_devices)
    # `jax.jit` drops arguments that the program never reads, so they are dropped here too.
    kept = exported.module_kept_var_idx
    donated = [at for at, flat in enumerate(kept) if job["donated"][flat]]
    jitted = jax.jit(_of_kept(exported, kept), donate_argnums=donated)
    args = [on_devices(exported.in_avals[at], shardings[at]) for at in sorted(kept)]
    report = _job(jitted.trace(*args), target, job["flops"]).run()
    # The report shows the buffers of arguments under the user's names.
    ours = {f"arguments[{at}]": job["names"][flat] for at, flat in enumerate(kept)}
    rename = lambda one: dataclasses.replace(one, operation=ours.get(one.operation, one.operation))
    return dataclasses.replace(report, buffers=tuple(map(rename, report.buffers)))


def _of_kept(exported: export.Exported, kept):
    """Returns the exported function as a function of only the arguments that it reads."""
    unread = [at for at in range(len(exported.in_avals)) if at not in kept]

    def step(*arguments):
        every = dict(zip(kept, arguments, strict=True))
        for at in unread:
            aval = exported.in_avals[at]
            every[at] = jax.lax.full(aval.shape, 0, aval.dtype)  # `full` makes typed keys too
        return exported.call(*(every[at] for at in sorted(every)))

    return step


def build_step(function: str, arguments: Mapping[str, Any]) -> BuiltStep:
    """Builds the step of an `Entry` in this process.

    Args:
      function: `Entry.function`.
      arguments: `Entry.arguments`.
    """
    module, _, name = function.partition(":")
    step = getattr(importlib.import_module(module), name)(**arguments)
    if isinstance(step, BuiltStep):
        return step
    fn, args, donate_argnums = step
    return BuiltStep(fn=fn, args=args, donate_argnums=donate_argnums)


def measure_built(step: BuiltStep, target: Target, topology) -> MemoryReport:
    """Returns the report of a step, with seconds and findings; the arguments of `job_of_built`."""
    return job_of_built(step, target, topology).run()


def job_of_built(step: BuiltStep, target: Target, topology) -> Job:
    """Returns the job that compiles a step for a topology's devices.

    Args:
      step: The step.
      target: The target.
      topology: The result of `get_topology`.

    Raises:
      PlacementError: The step's arguments are sharded over another number of devices.
    """
    leaves, tree = jax.tree.flatten(tuple(step.args))
    described = describe([getattr(leaf, "sharding", None) for leaf in leaves])
    placed = map(on_devices, leaves, rebuild(described, topology, target))
    step = dataclasses.replace(step, args=tree.unflatten(placed))
    traced = jax.jit(step.fn, donate_argnums=step.donate_argnums).trace(*step.args)
    rates = Rates.of_chip(target.known_chip)
    annotated = lambda report: annotate(step, traced.jaxpr, report, rates=rates)
    return _job(traced, target, count_flops(traced.jaxpr), step.compiler_options, annotated)


def get_topology(target: Target):
    """Returns JAX's topology of an absent target."""
    if target.backend == "cuda":
        hosts = max(1, target.num_devices // HOST_GPUS)
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=target.known_chip.name,
            target_config=target_config(target.known_chip),
            # Slices x hosts per slice x GPUs per host.
            topology=f"1x{hosts}x{target.num_devices // hosts}",
        )
    options: dict[str, Any] = {}
    assert target.topology is not None  # every TPU target has a topology
    if target.topology.endswith(":1x1"):  # one chip; libtpu's default host has four chips
        options["chips_per_host_bounds"] = [1, 1, 1]
    # JAX joins a v4's two cores into one device; libtpu joins them only with this option.
    if target.known_chip.name == "v4":
        options["chip_config_name"] = "megacore"
    return topologies.get_topology_desc(platform="tpu", topology_name=target.topology, **options)


def _job(
    traced,
    target: Target,
    flops: int,
    options: Mapping[str, int | str] | None = None,
    report: Callable[[MemoryReport], MemoryReport] = lambda report: report,
) -> Job:
    lowered = traced.lower(lowering_platforms=(target.backend,))
    if target.backend == "cuda":
        workspace.reserve(lowered.compiler_ir())
    about: dict[str, Any] = {"target": target, "flops": flops, "options": options}
    compiled = lambda: peak.compile_lowered(lowered, **about)[1]
    return Job(compile=compiled, report=report, lowered=lowered)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
