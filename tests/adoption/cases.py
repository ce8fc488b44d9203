"""What an adopted model is held to: few changed lines, equal gradients, fewer temporary bytes."""

import difflib
import inspect
import math

import jax

import jaxckpt
from jaxckpt.costs.flops import count_flops
from tests.transforms.cases import relative_error

# XLA's temporary bytes under `full`, as a part of the original loop's.
WELL_BELOW = 0.35


def product(*sizes: int) -> int:
    """Returns the operations of a matrix product: two for each multiply-add."""
    return 2 * math.prod(sizes)


def attention(tokens: int, width: int, length: int) -> int:
    """Returns the operations of an attention: four projections, scores, and their values."""
    return 4 * product(tokens, width, width) + 2 * product(tokens, width, length)


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


def check(original, adopted, *args, again: int, well_below: float = WELL_BELOW):
    """Raises unless two losses have equal gradients, and the second one needs far fewer bytes.

    Args:
      original: The loss of the model as it is.
      adopted: The loss of the model under `full`.
      *args: Their arguments; gradients are by all of them.
      again: The operations of what runs again: the layers' forward pass without the products that
        no gradient reads.
      well_below: The most bytes of temporaries, as a part of the original's.
    """
    (want, before, flops), (found, after, more) = (
        outcome(loss, *args) for loss in (original, adopted)
    )
    assert jax.tree.structure(found) == jax.tree.structure(want)
    assert relative_error(found, want) <= 1e-5
    # The twin: without recomputation the bytes and the operations are those of the loop.
    assert after <= well_below * before, (before, after)
    assert more == flops + again, (flops, more, again)


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
