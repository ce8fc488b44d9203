"""`while_loop`: reverse mode through a loop whose number of steps is known only while it runs.

    carry = jaxckpt.while_loop(cond, body, init, max_steps=1000, remat="binomial:16")

The schedule is made for `max_steps` steps. The forward pass stores carries as the schedule says
until `cond` is false, and keeps the number of steps that ran. The backward pass follows the same
schedule, with every bound cut at that number. It never calls `cond` again, so that rounding cannot
change the number of steps.

A loop that ends early has fewer carries near its end than a schedule of its own length would keep,
and recomputes more steps. With 8 slots and `max_steps` of 1024, a loop of 512 steps takes 2807
steps in all (2358 at best), one of 256 takes 1456 (1061), one of 64 takes 308 (202). So `max_steps`
should be at most four times the usual number of steps.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt.plans import Plan, PlanError
from jaxckpt.plans.errors import check_count, shown
from jaxckpt.schedules.of_stage import schedule_of, under_loss
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms import rows as slots_of
from jaxckpt.transforms.block_vjp import Moving
from jaxckpt.transforms.checks import check_carry, check_rerun, check_schedule
from jaxckpt.transforms.custom_gradient import batched_call, inexact, run_with_gradient
from jaxckpt.transforms.policies import plan_and_policy
from jaxckpt.transforms.scan import as_returned, scan
from jaxckpt.transforms.stack_blocks import How
from jaxckpt.transforms.stack_executor import Loops
from jaxckpt.transforms.tables import make_table
from jaxckpt.transforms.traced_block import as_arrays, identity, once_compiled, trace_block


def while_loop(
    cond: Callable,
    body: Callable,
    init,
    *,
    max_steps: int,
    remat: str | Plan | Schedule | Callable = "sqrt",
):
    """Runs `body` while `cond` holds, at most `max_steps` times; reverse mode goes through it.

    Args:
      cond: `cond(carry) -> bool`, a scalar. It has no gradient.
      body: `body(carry) -> carry`, pure. Arrays that `body` closes over get gradients.
      init: The first carry, any pytree of arrays.
      max_steps: The largest number of steps: the loop ends there even if `cond` still holds. The
        plan is made for this number.
      remat: A plan of a single schedule (`"sqrt"`, `"binomial:16"`, `"log"`), or a `Schedule` that
        records one step at a time. `"none"`, `"full"` and policies run all `max_steps` steps;
        steps after the end change nothing.

    Returns:
      The carry for which `cond` is false, or the carry after `max_steps` steps.

    Raises:
      PlanError: The plan does not parse, has several stages, or keeps whole segments (`uniform`).
      ValueError: `max_steps` is no positive whole number, `body` changes its carry, or `cond` does
        not return a boolean scalar.

    Example:
      >>> import jax, jax.numpy as jnp, jaxckpt
      >>> root = lambda a: jaxckpt.while_loop(
      ...     lambda x: jnp.abs(x * x - a) > 1e-4, lambda x: (x + a / x) / 2, a, max_steps=50)
      >>> print(f"{root(9.0):.3f} {jax.grad(root)(9.0):.3f}")
      3.000 0.167
    """
    for name, function in (("cond", cond), ("body", body)):
        if not callable(function):
            raise ValueError(
                f"{name} of while_loop is a function of the carry, not {shown(function)}"
            )
    check_count("max_steps", max_steps, " of steps")
    asked = remat
    remat, given = (remat, None) if isinstance(remat, Schedule) else plan_and_policy(remat)
    init = as_arrays(init)
    schedule = _schedule(remat, max_steps)
    step, consts = trace_block(lambda carry, _: body(carry), init)
    init, is_cast = as_returned(init, step.out)
    if is_cast:
        step, consts = trace_block(lambda carry, _: body(carry), init)
    check_carry(init, step.out)
    check_rerun(step, remat, given)
    until, until_consts = trace_block(lambda carry, _: cond(carry), init)
    _check_boolean(until.out)
    if schedule is None:
        step_of = lambda carry, _: (lax.cond(cond(carry), body, lambda x: x, carry), None)
        return scan(step_of, init, None, max_steps, remat=asked)[0]
    program = once_compiled(_run, (identity(cond), identity(body)), until, step, schedule)
    leaves, tree = jax.tree.flatten(init)
    return jax.tree.unflatten(tree, program(leaves, consts, until_consts))


def _schedule(remat: Plan | Schedule, max_steps: int) -> Schedule | None:
    """Returns the schedule of `max_steps` steps; None if the plan keeps every step's carry."""
    if isinstance(remat, Schedule):
        check_schedule(remat, max_steps, nested=False)
        found = remat
    else:
        stage, *others = remat.bind(max_steps).stages
        if others:
            raise PlanError(f"plan {str(remat)!r} has several stages; while_loop takes one")
        if stage.policies and stage.schedule != "full":
            raise PlanError(f"plan {str(remat)!r}: while_loop takes no policies with a schedule")
        found = schedule_of(stage)
    if found is None:
        return None
    found = under_loss(found)
    table = make_table(found)
    if table.records:
        raise PlanError(
            f"{str(remat)!r} keeps whole segments from the forward pass, whose end while_loop does "
            "not know; sqrt, log and binomial:N record one step at a time"
        )
    return found


def _check_boolean(made: Any):
    is_boolean = hasattr(made, "dtype") and not made.shape and made.dtype == bool
    if not is_boolean:
        raise ValueError(f"cond of while_loop returns a boolean scalar, not {made}")


def _run(until, step, schedule: Schedule, carry, consts, until_consts) -> list:
    args = ([], carry, [*consts, *until_consts])
    call = lambda carry, params_i, both: step.call(carry, params_i, both[: len(consts)])
    holds = lambda carry, both: until.call(carry, [], both[len(consts) :])[0]
    loops = Loops.of(call, make_table(schedule), How(), args)
    return run_with_gradient(_Until(loops=loops, holds=holds), *args)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Until:
    """The forward and the backward pass of one loop.

    Attributes:
      loops: The executor's loops over `max_steps` steps without parameters.
      holds: `holds(carry, consts)`: whether there is a next step.
    """

    loops: Loops
    holds: Callable

    def out_dim(self, place: int) -> int:
        """Returns 0: every output has its batch axis first."""
        return 0

    def batched(self, args: Sequence, dims: Sequence, axis) -> tuple["_Until", Sequence]:
        """Returns the loop of a batch, which runs until the last example is done."""
        loops, args = self.loops.batched(args, dims, axis)
        first = [None if dim is None else 0 for dim in dims[2]]
        each = batched_call(lambda carry, consts: [self.holds(carry, consts)], (0, first), axis)

        def call(carry, params_i, consts):
            (go_on,) = each(carry, consts)
            pairs = zip(loops.call(carry, params_i, consts), carry, strict=True)
            # The loop runs until the last example is done; an example that is done keeps its carry.
            shape = lambda x: go_on.reshape(go_on.shape + (1,) * (x.ndim - 1))
            return [jnp.where(shape(x), x, old) for x, old in pairs]

        frozen = Loops.of(call, loops.table, loops.how, args)
        holds = lambda carry, consts: each(carry, consts)[0].any()
        return _Until(loops=frozen, holds=holds), args

    def run(self, params, carry, consts) -> list:
        """Returns the output."""
        body = lambda state: (state[0] + 1, self.loops.next(params, consts, state[1], state[0]))
        return self._until(consts, body, (0, carry))[1]

    def forward(self, args, asked: Sequence[int]):
        """Returns the output, and the residuals for the backward pass."""
        params, carry, consts = args
        moving = Moving.of(asked, params, carry, consts)
        moving = dataclasses.replace(moving, outputs=tuple(inexact(carry)))
        slots = slots_of.empty(carry, self.loops.table.num_slots, on_host=False)
        sweep_slots = jnp.asarray(self.loops.table.sweep_slots)

        def body(state):
            index, carry, slots = state
            slots = self.loops.store(slots, sweep_slots[index], carry)
            return index + 1, self.loops.next(params, consts, carry, index), slots

        num_steps, carry, slots = self._until(consts, body, (0, carry, slots))
        return carry, (num_steps, (params, consts, slots, [], moving))

    def backward(self, residuals, grads) -> list:
        """Returns the gradients that are asked for, of carry and consts."""
        num_steps, rest = residuals
        return self.loops.backward(rest, grads, num_steps)

    def _until(self, consts, body: Callable, state):
        goes_on = lambda state: (state[0] < self.loops.length) & self.holds(state[1], consts)
        return lax.while_loop(goes_on, body, state)
