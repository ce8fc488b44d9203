"""What users hand to the adapters: a class of blocks, a call's values, and how a result is parted.

`jit`, `scan` and `checkpoint` turn every number they are handed into a traced array, and then
`if train:` fails inside. The adapters hand arrays over and leave Python values (`True`, `"gelu"`,
a function) as they are.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxckpt.plans.errors import shown


def apart(tree) -> tuple[list, Callable[[Sequence], Any]]:
    """Returns the arrays of a pytree, and `merge(arrays)`, which returns the tree with others.

    A Python number stays one: it is as weakly typed in the block as in a loop without remat.
    """
    leaves, structure = jax.tree.flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if _is_array(leaf)]

    def merge(arrays: Sequence):
        merged = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            merged[place] = array
        return jax.tree.unflatten(structure, merged)

    return [leaves[place] for place in places], merge


def part(result, out) -> tuple[Any, Any]:
    """Returns the carry of a block's result, and the rest, which has None in its place.

    Args:
      result: What a block returned.
      out: None where that is the carry; its index or key in the result; or a function from the
        result to the carry, which leaves no rest.

    Raises:
      ValueError: The result has nothing there.
    """
    if out is None:
        return result, None
    if callable(out):
        return out(result), None
    try:
        carry = result[out]
        return carry, put(None, result, out)
    except (TypeError, KeyError, IndexError):
        raise ValueError(
            f"out={out!r} is the place of the carry in what a block returns, which is "
            f"{jax.tree.structure(result)}"
        ) from None


def put(carry, rest, out):
    """Returns a result with a carry in its place, from the rest of `part`."""
    if out is None or callable(out):
        return carry
    if isinstance(rest, dict):
        return {**rest, out: carry}
    items = list(rest)
    items[out] = carry
    return type(rest)(*items) if hasattr(rest, "_fields") else type(rest)(items)


def check_class(block, module: type, taker: str, *, takes_functions: bool = False):
    """Raises `ValueError` for a block that is a module rather than what makes one.

    Args:
      block: What the user gave for it.
      module: The class of the library's modules.
      taker: What takes the block, for the text.
      takes_functions: Whether a function that returns a module will do.
    """
    if isinstance(block, module):
        raise ValueError(
            f"{taker} takes the class {type(block).__name__} or a functools.partial of it, not an "
            "instance; it makes the blocks by itself"
        )
    made = block
    while isinstance(made, functools.partial):
        made = made.func
    is_other = isinstance(made, type) and not issubclass(made, module)
    if is_other or not callable(made) or (inspect.isfunction(made) and not takes_functions):
        raise ValueError(
            f"{taker} takes a module class of {module.__module__.rpartition('.')[0]} or a "
            f"functools.partial of one, not {shown(made)}"
        )


def _is_array(leaf) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic) or hasattr(leaf, "__jax_array__")
