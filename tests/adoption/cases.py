"""What an adopted model is held to: few changed lines, equal gradients, fewer temporary bytes."""

import difflib
import inspect

import jax

import jaxckpt
from jaxckpt.costs.flops import count_flops
from tests.transforms.cases import relative_error

# XLA's temporary bytes under `full`, as a part of the original loop's.
WELL_BELOW = 0.35
# Operations under `full`, as a part of the original's: a forward pass more, but for the loss.
AGAIN = (1.15, 4 / 3 + 0.01)


def changed_lines(old, new) -> int:
    """Returns how many lines of a method are new or changed in the other one."""
    texts = [[line.strip() for line in inspect.getsource(one).splitlines()] for one in (old, new)]
    return sum(line.startswith("+ ") for line in difflib.ndiff(*texts))


def outcome(loss, *args):
    """Returns values and gradients by all arguments, the temporary bytes and the operations."""
    step = jax.value_and_grad(loss, argnums=tuple(range(len(args))))
    compiled = jax.jit(step).lower(*args).compile()
    flops = count_flops(jax.make_jaxpr(step)(*args))
    return compiled(*args), compiled.memory_analysis().temp_size_in_bytes, flops


def check(original, adopted, *args, well_below: float = WELL_BELOW):
    """Raises unless two losses have equal gradients, and the second one needs far fewer bytes."""
    (want, before, flops), (found, after, more) = (
        outcome(loss, *args) for loss in (original, adopted)
    )
    assert jax.tree.structure(found) == jax.tree.structure(want)
    assert relative_error(found, want) <= 1e-5
    # The twin: without recomputation the bytes and the operations are those of the loop.
    assert after <= well_below * before, (before, after)
    assert AGAIN[0] <= more / flops <= AGAIN[1], (flops, more)


def check_fit(loss_of, num_blocks, *args):
    """Raises unless `fit` finds a plan that needs less than `none`, and a plan for each budget.

    Args:
      loss_of: From a plan to the adopted model's loss.
      num_blocks: The number of layers.
      *args: The loss's.
    """
    step_for = lambda plan: (jax.value_and_grad(loss_of(plan)), args)
    full, none = (jaxckpt.measure(*_call(step_for(plan))).peak_bytes for plan in ("full", "none"))
    result = jaxckpt.fit(step_for, num_blocks=num_blocks, budget=(full + none) // 2)
    assert result.report.peak_bytes <= result.budget_bytes < none
    assert result.plan.bind(num_blocks).num_blocks == num_blocks


def _call(step) -> tuple:
    fn, args = step
    return fn, *args
