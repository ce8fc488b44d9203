"""The values of a block that a plan can name without a tag, as a trace of the block sees them.

`transforms.invented` puts a tag on each of them; here these tags are found again in the flat steps
of the block's `jax.vjp`. A tag in a loop's body belongs to what the loop stacks of it.
"""

from collections.abc import Callable

from jaxckpt.memory.flat import Flat, Step, Value, bodies
from jaxckpt.memory.flops import is_kernel
from jaxckpt.memory.residuals import Trace, origin_of
from jaxckpt.transforms import invented, jaxprs, tags


def all_named(block: Callable, *, opens_remat: bool = False) -> Callable:
    """Returns a block with a tag on all that can have one; see `invented.named`."""
    return invented.named(block, lambda name: True, opens_remat=opens_remat)


def values_by_name(flat: Flat) -> dict[str, tuple[Value, ...]]:
    """Returns the values of each invented name, in the order of the steps that make them.

    Args:
      flat: The forward pass of a block made by `all_named`.
    """
    found: dict[str, tuple[Value, ...]] = {}
    for value, names in _names(flat).items():
        for name in names:
            found[name] = (*found.get(name, ()), value)
    return found


def names_by_key(block: Callable, params_i, carry, consts: tuple) -> dict[tuple, str]:
    """Returns the invented names of a block's values by the keys of `Trace`.

    A trace of the block as it is has the same keys; with a tag on all values it would keep some of
    them twice, once with and once without.
    """
    trace = Trace(all_named(block), params_i, carry, consts)
    found = values_by_name(trace.flat).items()
    return {trace.key_of(value): name for name, values in found for value in values}


def _names(flat: Flat) -> dict[Value, list[str]]:
    """Returns the invented names of values."""
    found: dict[Value, list[str]] = {}
    for step in flat.steps:
        if step.name == jaxprs.TAG:
            name = tags.invented_name(step.params["name"])
            if name is not None:
                found.setdefault(origin_of(step.outputs[0]), []).append(name)
        elif not is_kernel(step):
            for value, names in _inside(step):
                found.setdefault(value, []).extend(names)
    return found


def _inside(step: Step):
    """Yields outputs of a loop or branch with the names that they have in its functions."""
    for body in bodies(step):
        names = _names(body)
        for outer, inner in zip(step.outputs, body.outputs, strict=False):
            if origin_of(inner) in names:
                yield outer, names[origin_of(inner)]
