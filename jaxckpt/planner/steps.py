"""A user's `step_for`, asked for the step of a plan: traced, compiled, and each plan once."""

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.sharding import Mesh

from jaxckpt.memory import cache, traveling
from jaxckpt.memory.measure import jitted, measure, program_key
from jaxckpt.memory.report import MemoryReport
from jaxckpt.memory.targets import Target
from jaxckpt.planner.places import Finder, Phases
from jaxckpt.plans import Plan, PlanError
from jaxckpt.plans.plan_set import PlanSet, plan_json
from jaxckpt.transforms.observers import observed

# Functions in an equation's parameters are shown with where they are in memory.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_OPTIONS = ("donate_argnums", "static_argnums")


class Step(NamedTuple):
    """What `step_for` returned."""

    fn: Callable
    args: tuple
    options: dict[str, Any]


class Trace(NamedTuple):
    """A step as it was traced: its jaxpr, and where that runs stacks."""

    jaxpr: core.ClosedJaxpr
    phases: Phases


class Steps:
    """The steps of plans for one target.

    Attributes:
      compiled: Reports by plan.
    """

    def __init__(
        self,
        step_for: Callable,
        target: Target,
        report_of: Callable[[Any], MemoryReport] | None = None,
    ):
        """Takes a user's function.

        Args:
          step_for: As for `jaxckpt.fit`.
          target: What is compiled for.
          report_of: Compiles the step of a plan, where `measure` is not to do it.
        """
        if not callable(step_for):
            raise ValueError(
                f"step_for is a function of a plan that returns (fn, args), not {step_for!r}"
            )
        self._step_for = step_for
        self._target = target
        self._report_of = report_of or self._measured
        self._first = self
        self._traced: dict[Plan | PlanSet, Trace] = {}
        self.compiled: dict[Plan | PlanSet, MemoryReport] = {}

    def apart(self, plans: Iterable[Plan | PlanSet] = ()) -> "Steps":
        """Returns the same steps of which some plans are compiled and no others.

        What any of them compiles is compiled once for all.
        """
        made = copy.copy(self)
        made.compiled = {plan: self.report(plan) for plan in plans}
        made._report_of = self._first.report
        return made

    def step(self, plan: Plan | PlanSet) -> Step:
        """Returns the step of a plan.

        Raises:
          ValueError: `step_for` returned something else.
        """
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
        """Returns the devices that the arguments of a plan's step are spread over."""
        args = jax.tree.leaves(self.step(plan).args)
        meshes = [getattr(getattr(leaf, "sharding", None), "mesh", None) for leaf in args]
        return max((mesh.size for mesh in meshes if mesh is not None), default=1)

    def trace(self, plan: Plan | PlanSet) -> Trace:
        """Returns a plan's step as it is traced.

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
        """Returns the memory of a plan's compiled step."""
        if plan not in self.compiled:
            self.compiled[plan] = self._report_of(plan)
        return self.compiled[plan]

    def _measured(self, plan: Plan | PlanSet) -> MemoryReport:
        """Returns a report by `measure`.

        What was compiled before is read from disk: `measure` does so for absent chips, and here
        it is done for the chip of this process.
        """
        step = self.step(plan)
        measured = lambda: measure(step.fn, *step.args, target=self._target, **step.options)
        return measured() if self._target.backend != "local" else self.kept(plan, measured)

    def kept(
        self, plan: Plan | PlanSet, made: Callable[[], MemoryReport], **parts: Any
    ) -> MemoryReport:
        """Returns the report of a plan's step from disk, where it is made if it is not there.

        Args:
          plan: The plan.
          made: Compiles its step.
          **parts: What the report depends on beside the program, the target and what `cache.key`
            and `cache.here` know of, as JSON values.
        """
        fn, args, options = self.step(plan)
        program, args = jitted(fn, args, **options)
        traced = traveling.trace(program, args)
        is_here = self._target.backend == "local"
        backend = None if is_here else (self._target.backend,)
        name = program_key(
            traced.lower(lowering_platforms=backend),
            plan=plan_json(plan),
            target=self._target.name,
            devices_of_arguments=_devices(args),
            **parts,
        )
        report = cache.load(name)
        if report is None:
            report = made()
            cache.store(name, report)
        return report


def _devices(args: Sequence) -> list[list[int]]:
    """Returns the devices of arguments' meshes, in order: a program's text has their number."""
    leaves = jax.tree.leaves(tuple(args))
    meshes = {getattr(getattr(leaf, "sharding", None), "mesh", None) for leaf in leaves}
    ids = {tuple(one.id for one in mesh.devices.flat) for mesh in meshes if isinstance(mesh, Mesh)}
    return sorted(map(list, ids))


def is_same_program(one: Trace, other: Trace) -> bool:
    """Returns whether two traces are of one program."""
    return program_text(one.jaxpr) == program_text(other.jaxpr)


def program_text(jaxpr) -> str:
    """Returns a jaxpr as text that is the same each time it is traced."""
    return _ADDRESS.sub("", str(jaxpr))
