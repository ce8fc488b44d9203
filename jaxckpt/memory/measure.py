"""`measure`: compile a function for a chip and read the memory it needs, without running it.

    print(jaxckpt.measure(train_step, state, batch, donate_argnums=0))
    print(jaxckpt.measure(train_step, state, batch, donate_argnums=0, target="v5e-1"))

Arguments may be arrays, or a `jax.ShapeDtypeStruct` each, for which nothing is allocated. The chip
may be absent (`absent/jobs.py`).
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxckpt.absent import exported, jobs, launch
from jaxckpt.compiled import cache, peak
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.costs.flops import count_flops
from jaxckpt.costs.roofline import rates_of
from jaxckpt.memory.built_step import BuiltStep, annotate
from jaxckpt.memory.job import Job
from jaxckpt.plans.errors import shown
from jaxckpt.targets.target import LOCAL, Target, parse_target

_EXECUTABLES = "jax_compilation_cache_dir"  # an attribute that JAX's types do not have
# XLA for CPUs assigns buffers before LLVM runs, so a program that only a report needs is compiled
# without LLVM's optimizations, which take most of the time.
_REPORT_ONLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def measure(
    fn: Callable,
    *args,
    target: str | Target = "local",
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
) -> MemoryReport:
    """Compiles `fn(*args)` for a chip and returns the memory that XLA says it needs.

    For an absent chip a fresh process compiles, and the report is kept on disk, so a program is
    compiled once. A step that does not fit has a report too, with negative `headroom_bytes`.

    On a target of several devices the report is per device. Arguments with a `NamedSharding` are
    spread over a mesh of the target's devices with the same axes. The argument's mesh may be a
    `jax.sharding.AbstractMesh`. Each device holds every argument without a sharding as a whole.

    Args:
      fn: A function, or a result of `jax.jit` or `nnx.jit`. Without `donate_argnums`, the donations
        of a jitted function are used. A function of NNX modules is compiled by `nnx.jit`, and state
        that the function changes is then an output.
      *args: Arrays or abstract values.
      target: `"local"`, the backend of this process, or a chip, such as `"v5e-1"` or `"h100"`;
        `jaxckpt.targets.target` lists all targets.
      donate_argnums: The positions of arguments whose memory outputs may reuse. Without donation
        the peak of a training step has parameters and optimizer state twice.
      static_argnums: The positions of arguments that are compile-time constants.

    Returns:
      A `MemoryReport`, in bytes per device; `print` shows a table.

    Raises:
      ValueError: `fn` is not a function or holds arrays, or an argument is not an array.
      TargetError: The target is unknown.
      Unavailable: The target's compiler is not installed; the error names the command to install.
      PlacementError: Arguments are sharded over more or fewer devices than the target has.
      TravelError: `fn` cannot be sent to another process.
      WorkerError: Compiling for an absent chip failed.

    Example:
      >>> import jax.numpy as jnp, jaxckpt
      >>> report = jaxckpt.measure(lambda x: x @ x, jnp.ones([256, 256]))
      >>> report.argument_bytes, report.output_bytes, report.flops
      (262144, 262144, 33554432)
    """
    made, args = jitted(fn, args, donate_argnums, static_argnums)
    return job_of(made, args, parse_target(target)).run()


def job_of(made, args: tuple, target: Target) -> Job:
    """Returns the job that compiles a function for a target.

    Args:
      made: The function that `jitted` returned.
      args: The arguments that `jitted` returned.
      target: The target.

    Raises:
      Unavailable, PlacementError, TravelError: As for `measure`.
    """
    if target.backend == "local":
        traced = exported.trace(made, args)
        options = _REPORT_ONLY if jax.default_backend() == "cpu" else None
        return _job_here(traced, lambda found: found[1], options)
    launch.check_available(target)
    traveler = exported.pack(made, args, target.backend)
    asked: dict[str, Any] = {"names": list(traveler.names), "donated": list(traveler.donated)}
    asked |= {"placement": traveler.placement, "flops": traveler.flops}
    asked |= {"target": target, "digest": traveler.digest()}
    compiled = functools.partial(jobs.measure_program, traveler.program, **asked)
    return Job(compile=compiled, report=lambda report: report)


def jitted(fn: Callable, args: tuple, donate_argnums=(), static_argnums=()) -> tuple[Any, tuple]:
    """Returns a function under `jax.jit` or `nnx.jit`, and its arguments.

    Args:
      fn: As for `measure`. A partial of a jitted function is unwrapped.
      args: The arguments.
      donate_argnums: As for `measure`.
      static_argnums: As for `measure`.

    Raises:
      ValueError: As for `measure`.
    """
    if not callable(fn):
        raise ValueError(f"measure takes a function and its arguments, not {shown(fn)} first")
    has_options = donate_argnums != () or static_argnums != ()
    if isinstance(fn, functools.partial) and hasattr(fn.func, "trace") and not fn.keywords:
        # A partial of a jitted function is unwrapped, because it would lose its donations under a
        # new `jit`.
        return jitted(fn.func, (*fn.args, *args), donate_argnums, static_argnums)
    if hasattr(fn, "trace") and not has_options:
        return fn, args
    _check_holds_nothing(fn)
    if exported.has_nnx(args):
        if hasattr(fn, "trace"):
            raise ValueError(
                "a function of NNX modules has options of its own; give donate_argnums and "
                "static_argnums to nnx.jit, and its result to measure"
            )
        from flax import nnx  # already imported by the maker of the arguments

        jit = nnx.jit
    else:
        jit = jax.jit
        _check_arrays(args, static_argnums)
    call = fn if _has_hash(fn) else lambda *args: fn(*args)  # `jit` keeps functions by their hash
    made: Any = jit(call, donate_argnums=donate_argnums, static_argnums=static_argnums)
    if donate_argnums == () and hasattr(getattr(fn, "func", fn), "lower"):
        equations = exported.trace(made, args).jaxpr.eqns
        if any(any(equation.params.get("donated_invars", ())) for equation in equations):
            raise ValueError(
                f"{shown(fn)} is compiled already, and measure cannot see which arguments it "
                "donates; give measure its donate_argnums"
            )
    return made, args


def _check_holds_nothing(fn: Callable):
    """Raises `ValueError` for a module, or a module's method, that holds arrays."""
    holder = fn.__self__ if inspect.ismethod(fn) else fn
    leaves = jax.tree.leaves(holder)
    is_tree = not jax.tree_util.all_leaves([holder])
    holds_arrays = is_tree and any(hasattr(leaf, "dtype") for leaf in leaves)
    # A bound Linen module is not a pytree, but it has no hash because it holds variables.
    if holds_arrays or not (is_tree or _has_hash(holder)):
        raise ValueError(
            f"{shown(holder)} holds arrays, which would be constants of the program; hand them "
            "over as arguments, such as measure(module.apply, variables, x) or "
            "measure(lambda module, x: module(x), module, x)"
        )


def _has_hash(value) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _check_arrays(args: tuple, static_argnums: int | Sequence[int]):
    """Raises `ValueError` for an argument that is neither static nor a pytree of arrays."""
    numbers = [static_argnums] if isinstance(static_argnums, int) else static_argnums
    static = {number % len(args) for number in numbers} if args else set()
    dynamic = [None if place in static else arg for place, arg in enumerate(args)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(dynamic):
        try:
            jax.typeof(leaf)
        except TypeError:
            raise ValueError(
                f"args{jax.tree_util.keystr(path)} is {shown(leaf)}, no array; close over it "
                "(functools.partial; equinox.partition for a module), or name its argument in "
                "static_argnums"
            ) from None


def compile_step(step: BuiltStep):
    """Compiles a step for this process's backend.

    Args:
      step: The step.

    Returns:
      `(compiled, report)`: the executable, and its report with seconds and findings.
    """
    job = job_of_step(step)
    compiled, report = job.compile()
    return compiled, job.report((compiled, report))


def job_of_step(step: BuiltStep) -> Job:
    """Returns the job that compiles a step for this process's backend."""
    traced = jax.jit(step.fn, donate_argnums=step.donate_argnums).trace(*step.args)

    def annotated(found) -> MemoryReport:
        compiled, report = found
        # Only the CPU's compiler undoes unrolled remat, and only its text shows every product.
        text = compiled.as_text if jax.default_backend() == "cpu" else None
        rates = rates_of(LOCAL)
        return annotate(step, traced.jaxpr, report, rates=rates, compiled_text=text)

    return _job_here(traced, annotated, step.compiler_options)


def _job_here(
    traced,
    report: Callable[[Any], MemoryReport],
    options: Mapping[str, int | str] | None = None,
) -> Job:
    """Returns the job of a traced function; its `compile` returns the program and a report.

    If JAX reads a program from its own cache, the compiler dumps no buffers. So the buffers of the
    first report are kept on disk.
    """
    lowered, flops = traced.lower(), count_flops(traced.jaxpr)
    is_kept = getattr(jax.config, _EXECUTABLES)
    name = program_key(lowered, kind="buffers", options=dict(options or {})) if is_kept else None

    def compiled():
        made, report = peak.compile_lowered(lowered, flops=flops, options=options)
        if name is not None and report.buffers:
            cache.store(name, report)
        elif name is not None and (first := cache.load(name)):
            changes = {"buffers": first.buffers, "understood": first.understood}
            report = dataclasses.replace(report, **changes)
        return made, report

    return Job(compile=compiled, report=report, lowered=lowered)


def program_key(lowered, **parts: Any) -> str:
    """Returns the name under which a result of a program for this process's backend is kept.

    Args:
      lowered: The program, from `jax.jit(f).lower(...)`. Its text has the shardings of arguments
        and results, donations, and the values of static arguments.
      **parts: Further JSON values that the result depends on.
    """
    sources = cache.digest_of_sources({"jaxckpt"})
    return cache.key(program=lowered.as_text(), sources=sources, **cache.here(), **parts)
