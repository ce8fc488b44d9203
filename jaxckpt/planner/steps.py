"""The step of each plan, from a user's `step_for`: traced and compiled once for each plan.

`find_stacks` finds the stacks that follow each plan. It traces the step once for each name, with
`none` as this name's plan and `full` as the other plans. Stacks run in the order of traced calls.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend import core
from jax.sharding import Mesh

from jaxckpt.absent import launch
from jaxckpt.compiled import cache
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.memory.job import Job
from jaxckpt.memory.measure import jitted, job_of, program_key
from jaxckpt.planner.places import Finder, Phases, following, held_together, places
from jaxckpt.planner.stacks import Stack, given_stack
from jaxckpt.plans import Plan, PlanError
from jaxckpt.plans.errors import nearest
from jaxckpt.plans.plan_set import PlanSet, plan_json
from jaxckpt.targets.target import Target
from jaxckpt.transforms.observers import observed
from jaxckpt.transforms.traced_block import text_of

_OPTIONS = ("donate_argnums", "static_argnums")


Watch: TypeAlias = Callable[[Plan | PlanSet, MemoryReport | None, float | None], None]


class Step(NamedTuple):
    """The result of a user's `step_for`."""

    fn: Callable
    args: tuple
    options: dict[str, Any]


class Trace(NamedTuple):
    """A traced step: its jaxpr, and the phases in which it runs stacks."""

    jaxpr: core.ClosedJaxpr
    phases: Phases


class Steps:
    """A step under any plan for one target; each plan's step is traced and compiled when needed.

    Attributes:
      compiled: The reports of compiled plans, by plan.
    """

    def __init__(
        self,
        step_for: Callable,
        target: Target,
        report_of: Callable[[Any], MemoryReport | Job] | None = None,
    ):
        """Takes a user's function.

        Args:
          step_for: `step_for(plan)` returns a step, as for `jaxckpt.fit`.
          target: The chip to compile for.
          report_of: Returns the report of a plan's step if the report is known, else the job that
            compiles the step; None to compile as `measure` does.
        """
        if not callable(step_for):
            raise ValueError(
                f"step_for is a function of a plan that returns (fn, args), not {step_for!r}"
            )
        self._step_for = step_for
        self._target = target
        self._report_of = report_of or self._measured
        self._watch: Watch = lambda *_: None
        self._first = self
        self._last: tuple[Any, Step] | None = None
        self._traced: dict[Plan | PlanSet, Trace] = {}
        self._failed: dict[Plan | PlanSet, Exception] = {}
        self.compiled: dict[Plan | PlanSet, MemoryReport] = {}

    @classmethod
    def of_built(cls, built: Callable, target: Target, report_of: Callable) -> "Steps":
        """Returns the steps of a function that returns a `BuiltStep` for each plan.

        Args:
          built: `built(plan)` returns a `BuiltStep`.
          target: The chip to compile for.
          report_of: As for `Steps`.
        """

        def step_for(plan: Plan | PlanSet) -> Step:
            step = built(plan)
            return Step(step.fn, tuple(step.args), {"donate_argnums": step.donate_argnums})

        return cls(step_for, target, report_of)

    def apart(self, plans: Iterable[Plan | PlanSet] = ()) -> "Steps":
        """Returns a copy in which only the given plans count as compiled.

        All copies share one store of reports, so no plan is compiled twice.
        """
        made = copy.copy(self)
        made.compiled = {plan: self.report(plan) for plan in plans}
        return made

    def watched(self, watch: "Watch"):
        """Calls `watch(plan, report, seconds)` before and after each compilation.

        Before a compilation, the report and the seconds are None. After a failed compilation, only
        the report is None.
        """
        self._first._watch = watch

    def step(self, plan: Plan | PlanSet) -> Step:
        """Returns the step of a plan.

        The last step is kept, because JAX traces the same function only once.

        Raises:
          ValueError: The result of `step_for` has another form.
        """
        if self._last is None or self._last[0] != plan:
            self._last = plan, self._made(plan)
        return self._last[1]

    def _made(self, plan: Plan | PlanSet) -> Step:
        made = self._step_for(plan)
        if not isinstance(made, tuple | list) or len(made) not in (2, 3) or not callable(made[0]):
            raise ValueError(
                "step_for(plan) returns (fn, args) or (fn, args, {'donate_argnums': ...}), "
                f"not {type(made).__name__}"
            )
        fn, args, *rest = made
        options = dict(rest[0]) if rest else {}
        unknown = set(options) - set(_OPTIONS)
        if unknown:
            raise ValueError(
                f"step_for's option {min(unknown)!r} is not known; valid: {', '.join(_OPTIONS)}"
            )
        return Step(fn=fn, args=tuple(args), options=options)

    def num_devices(self, plan: Plan | PlanSet) -> int:
        """Returns the number of devices over which the arguments of a plan's step are spread."""
        args = jax.tree.leaves(self.step(plan).args)
        meshes = [getattr(getattr(leaf, "sharding", None), "mesh", None) for leaf in args]
        return max((mesh.size for mesh in meshes if mesh is not None), default=1)

    def trace(self, plan: Plan | PlanSet) -> Trace:
        """Returns the trace of a plan's step.

        Raises:
          ValueError: The step cannot run under the plan.
        """
        if plan not in self._traced:
            step, finder = self.step(plan), Finder()
            static = step.options.get("static_argnums", ())
            try:
                with observed(finder):
                    jaxpr = jax.make_jaxpr(step.fn, static_argnums=static)(*step.args)
            except PlanError as error:
                raise ValueError(f"step_for({str(plan)!r}) does not trace: {error}") from error
            self._traced[plan] = Trace(jaxpr, finder.phases(jaxpr))
        return self._traced[plan]

    def report(self, plan: Plan | PlanSet) -> MemoryReport:
        """Returns the memory report of a plan's step; compiles the step if no report is known.

        Raises:
          Exception: The error of tracing or compiling the step.
        """
        if plan not in self.compiled:
            with self.compiling([plan]):
                pass
            if plan in self._failed:
                raise self._failed[plan]
            self.compiled[plan] = self._first.compiled[plan]
        return self.compiled[plan]

    @contextlib.contextmanager
    def compiling(self, plans: Iterable[Plan | PlanSet]) -> Iterator[None]:
        """A context during which plans are compiled, several at once if the machine has room.

        All plans are traced before the context begins. After the context, `report` takes no time.
        If a plan's step failed, `report` raises its error. If the machine has room for only one
        compilation, only the first plan is compiled.

        Args:
          plans: The plans to compile.
        """
        first = self._first
        known = first.compiled.keys() | first._failed
        asked = [plan for plan in dict.fromkeys(plans) if plan not in known]
        # With several processes, compilers may wait for one another in the order of programs, so
        # every process must compile in the same order.
        room = launch.at_once() if jax.process_count() == 1 else 1
        begun: list[tuple[Plan | PlanSet, Job, float]] = []

        def jobs() -> Iterator[tuple[Plan | PlanSet, Job, float]]:
            for plan in asked if room > 1 else asked[:1]:
                started = time.perf_counter()
                first._watch(plan, None, None)
                try:
                    made = first._report_of(plan)
                except Exception as error:  # the user's step may raise anything
                    made = error
                if isinstance(made, Job):
                    begun.append((plan, made, started))
                    yield begun[-1]
                else:
                    ended(plan, made, started)

        def compiled(item: tuple[Plan | PlanSet, Job, float]) -> tuple[Any, float]:
            try:
                found = item[1].compile()
            except Exception as error:  # the compiler may raise anything
                found = error
            return found, time.perf_counter()

        def ended(plan, found: MemoryReport | Exception, started: float, stopped=None):
            seconds = (stopped or time.perf_counter()) - started
            if isinstance(found, Exception):
                first._failed[plan] = found
                first._watch(plan, None, seconds)
            else:
                first.compiled[plan] = found
                first._watch(plan, found, seconds)

        def reported(place: int, answer: tuple[Any, float]):
            (plan, job, started), (found, stopped) = begun[place], answer
            report = found if isinstance(found, Exception) else job.report(found)
            ended(plan, report, started, stopped)

        with launch.beside(compiled, jobs(), room, reported):
            yield

    def _measured(self, plan: Plan | PlanSet) -> MemoryReport | Job:
        """Returns the report from disk if the step's program was compiled before, else the job.

        A job for an absent chip itself reads its report from disk.
        """
        fn, args, options = self.step(plan)
        made, args = jitted(fn, args, **options)
        job = job_of(made, args, self._target)
        return job if job.lowered is None else self.kept(plan, job, args)

    def kept(self, plan: Plan | PlanSet, job: Job, args: Sequence, **parts: Any):
        """Returns the report of a plan's step from disk, or the job that makes and stores it.

        Args:
          plan: The plan.
          job: The step's job, with its program.
          args: The step's arguments.
          **parts: Further JSON values that the report depends on. The program, the target and the
            values of `cache.key` and `cache.here` are included without them.
        """
        name = program_key(
            job.lowered,
            plan=plan_json(plan),
            target=self._target.name,
            devices_of_arguments=_devices(args),
            **parts,
        )
        return cache.load(name) or job.storing(name)


def _devices(args: Sequence) -> list[list[int]]:
    """Returns the device ids of the arguments' meshes; a program's text does not have these ids."""
    leaves = jax.tree.leaves(tuple(args))
    meshes = {getattr(getattr(leaf, "sharding", None), "mesh", None) for leaf in leaves}
    ids = {tuple(one.id for one in mesh.devices.flat) for mesh in meshes if isinstance(mesh, Mesh)}
    return sorted(map(list, ids))


def is_same_program(one: Trace, other: Trace) -> bool:
    """Returns whether two traces have equal programs."""
    return text_of(one.jaxpr) == text_of(other.jaxpr)


_FULL, _NONE = Plan.parse("full"), Plan.parse("none")


def check_blocks(
    blocks: Sequence | Mapping[str, Sequence] | None, num_blocks: int | Mapping[str, int] | None
):
    """Checks the arguments `block` and `num_blocks` of `fit`.

    Args:
      blocks: The argument `block`.
      num_blocks: The argument `num_blocks`.

    Raises:
      ValueError: `block` is given without `num_blocks`, or the names of the two arguments differ.
    """
    if blocks is not None and num_blocks is None:
        raise ValueError("block is given for a stack of num_blocks; give num_blocks too")
    if blocks is None or not isinstance(num_blocks, Mapping):
        return
    names = ", ".join(map(repr, num_blocks))
    if not isinstance(blocks, Mapping):
        raise ValueError(f"block is one for each stack by name, as num_blocks is: {names}")
    for name in blocks:
        if name not in num_blocks:
            guess = nearest(str(name), num_blocks)
            raise ValueError(f"block has {name!r}, which num_blocks has not: {names}{guess}")
    missing = [name for name in num_blocks if name not in blocks]
    if missing:
        raise ValueError(f"block has none for {missing[0]!r}; num_blocks has {names}")


def everywhere(num_blocks: int | Mapping[str, int] | None, plan: str) -> Plan | PlanSet:
    """Returns one plan for all blocks, in the form that `step_for` takes.

    Args:
      num_blocks: A mapping by name for plans by name; else the result is one plan.
      plan: The plan's text, without counts.
    """
    is_named = isinstance(num_blocks, Mapping)
    return PlanSet.same(num_blocks, plan) if is_named else Plan.parse(plan)


def find_stacks(
    steps: Steps,
    num_blocks: int | Mapping[str, int] | None,
    blocks: Sequence | Mapping[str, Sequence] | None = None,
) -> dict[str, list[Stack]]:
    """Returns the stacks that follow each plan.

    Args:
      steps: Returns and traces the step of a plan.
      num_blocks: The number of blocks of each stack, or a mapping from names to numbers; None if
        tracing finds the number.
      blocks: `(block, params_i, carry, *consts)`, or a mapping from names to such tuples; None if
        tracing finds the stacks.

    Returns:
      Lists of stacks by name, in the order in which they first run; the name is `""` for one plan.

    Raises:
      ValueError: The step does not trace, no stack follows a plan, or a stack has another number
        of blocks.
    """
    is_named = isinstance(num_blocks, Mapping)
    counts: dict[str, Any] = dict(num_blocks) if is_named else {"": num_blocks}
    given: Any = blocks if is_named or blocks is None else {"": blocks}
    full = steps.trace(everywhere(num_blocks, "full"))
    order = list(places(full.phases))
    found, first = {}, {}
    for name in counts if given is None else given:
        all_but = PlanSet.same(counts, _FULL).replace(name, _NONE)
        none = steps.trace(all_but if is_named else _NONE)
        if given is None:
            followers = following(full.phases, _FULL, none.phases, _NONE)
            found[name] = [place.call.stack for place in held_together(full.phases, followers)]
            first[name] = min(map(order.index, followers), default=0)
        else:
            what = f"block[{name!r}]" if is_named else "block"
            found[name] = [given_stack(given[name], counts[name], what)]
            first[name] = len(first)
        if not found[name] or (given is not None and is_same_program(full, none)):
            raise ValueError(_ignored(name, full, none, is_given=given is not None))
        if counts[name] is None:
            _check_alike(found[name])
            continue
        wrong = [stack.num_blocks for stack in found[name] if stack.num_blocks != counts[name]]
        if wrong:
            what, whose = (f" of {name!r}", "its") if is_named else ("", "the")
            raise ValueError(
                f"num_blocks{what} is {counts[name]}, but the step runs a stack of {wrong[0]} "
                f"blocks under {whose} plan"
            )
    return {name: found[name] for name in sorted(found, key=first.__getitem__)}


def _check_alike(stacks: Sequence[Stack]):
    """Raises `ValueError` unless one plan can be for all stacks."""
    kinds = dict.fromkeys((stack.region is not None, stack.num_blocks) for stack in stacks)
    if len(kinds) > 1:
        texts = ("a function" if is_region else f"a stack of {n}" for is_region, n in kinds)
        raise ValueError(
            f"one plan is followed by {', '.join(texts)}; give each a plan of its own by name, "
            "such as num_blocks={'encoder': 12, 'head': 1} (1 for a function under "
            "jaxckpt.checkpoint): step_for then gets plans by name"
        )


def _ignored(name: str, full: Trace, none: Trace, *, is_given: bool) -> str:
    same = "the program is the same under 'none' and 'full'"
    if name:
        unseen = (
            f"no stack runs under it; hand plans[{name!r}] to scan_blocks or Stack as remat=, or "
            "give the blocks as block={name: (block, params_i, carry, *consts), ...}"
        )
        return f"step_for ignores the plan of {name!r}: {same if is_given else unseen}"
    for plan, trace in ((_FULL, full), (_NONE, none)):
        others = [place.call for place in places(trace.phases) if not place.call.is_under(plan)]
        if others:
            return (
                f"step_for ignores its plan: asked for {str(plan)!r}, its stack runs under "
                f"{others[0].remat!r}; hand the plan to scan_blocks or Stack as remat="
            )
    if is_same_program(full, none):
        return f"step_for ignores its plan: {same}"
    return (
        "the step runs no scan_blocks, jaxckpt Stack or jaxckpt.checkpoint while it is traced; "
        "give the block as block=(block, params_i, carry, *consts)"
    )
