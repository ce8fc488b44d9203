"""What an adopted model is held to: few changed lines, equal gradients, fewer temporary bytes."""

import difflib
import inspect

import jax

from tests.transforms.cases import relative_error

# XLA's temporary bytes under `full`, as a part of the original loop's.
WELL_BELOW = 0.6


def changed_lines(old, new) -> int:
    """Returns how many lines of a method are new or changed in the other one."""
    texts = [[line.strip() for line in inspect.getsource(one).splitlines()] for one in (old, new)]
    return sum(line.startswith("+ ") for line in difflib.ndiff(*texts))


def outcome(loss, *args):
    """Returns the values of a loss and its gradients by all arguments, and the temporary bytes."""
    step = jax.value_and_grad(loss, argnums=tuple(range(len(args))))
    compiled = jax.jit(step).lower(*args).compile()
    return compiled(*args), compiled.memory_analysis().temp_size_in_bytes


def check(original, adopted, *args):
    """Raises unless two losses have equal gradients, and the second one needs far fewer bytes."""
    (want, before), (found, after) = (outcome(loss, *args) for loss in (original, adopted))
    assert jax.tree.structure(found) == jax.tree.structure(want)
    assert relative_error(found, want) <= 1e-5
    # The twin: without recomputation the bytes are those of the loop.
    assert after <= WELL_BELOW * before, (before, after)
