"""Which values XLA holds for a backward pass: fewer values than the residuals of JAX.

`jax.vjp` keeps every value that a derivative reads. XLA fuses: it recomputes an elementwise value
in the kernel that reads it, from values that are held anyway. A U-Net whose residuals in JAX have
16.6 GiB therefore holds 2.9 GiB on an H200. This module estimates the held values of one function
that is not in a loop:

- products, convolutions, reductions, kernels and loops are held;
- instead of an elementwise value its sources are held, if only a few of them are not held yet and
  their bytes are hardly more than the value's; otherwise the value is held.

Residuals behind a barrier, such as those of `jax.checkpoint`, are all held.
"""

from collections.abc import Iterable

from jaxckpt.costs.flat import Value
from jaxckpt.costs.fusion import kind_of
from jaxckpt.costs.residuals import origin_of

_SLACK = 1.1
_MOST_SOURCES = 8


def held(residuals: Iterable[Value]) -> tuple[Value, ...]:
    """Returns the values that XLA holds, so that a backward pass can read some residuals."""
    origins = list(dict.fromkeys(map(origin_of, residuals)))
    found = {value: None for value in origins if value.step is not None and not _is_fused(value)}
    for value in origins:
        new = [source for source in _sources(value, found) if source not in found]
        if sum(source.nbytes for source in new) > _SLACK * value.nbytes:
            new = [value]
        found.update(dict.fromkeys(new))
    return tuple(found)


def _is_fused(value: Value) -> bool:
    return value.step is not None and kind_of(value.step) == "fused"


def _sources(value: Value, known: dict[Value, None]) -> tuple[Value, ...]:
    """Returns the values that a fused kernel would read for `value`, without the inputs."""
    found: dict[Value, None] = {}
    todo, seen = [value], set()
    while todo:
        one = origin_of(todo.pop())
        if one in seen or one.step is None:
            continue
        seen.add(one)
        if one in known or not _is_fused(one):
            found[one] = None
        else:
            todo += one.step.inputs
        if len(seen) > _MOST_SOURCES**2 or len(found) > _MOST_SOURCES:
            return (value,)
    return tuple(found)
