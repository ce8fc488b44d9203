"""Arguments of the adapters: separates arrays from Python values, and the carry from a result.

`jit`, `scan` and `checkpoint` turn every number they get into a traced array, and then `if train:`
fails inside. The adapters pass arrays on and leave Python values (`True`, `"gelu"`, a function) as
they are.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxckpt.plans.errors import shown


def apart(tree) -> tuple[list, Callable[[Sequence], Any]]:
    """Returns the arrays of a pytree, and `merge(arrays)`, which puts other arrays in their places.

    Python numbers stay Python numbers, so that they are as weakly typed as in a loop without remat.
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
    """Returns the carry of a block's result, and the result with None in the carry's place.

    Args:
      result: What a block returned.
      out: None if the result is the carry; or the carry's index or key in the result; or a function
        from the result to the carry, and then the rest is None.

    Raises:
      ValueError: The result has no such index or key.
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
    """Returns a result with a carry put back in its place; `rest` is what `part` returned."""
    if out is None or callable(out):
        return carry
    if isinstance(rest, dict):
        return {**rest, out: carry}
    items = list(rest)
    items[out] = carry
    return type(rest)(*items) if hasattr(rest, "_fields") else type(rest)(items)


def check_class(block, module: type, taker: str, *, takes_functions: bool = False):
    """Raises `ValueError` unless a block is a class of modules.

    Args:
      block: The user's argument.
      module: The base class of the library's modules.
      taker: The name of the function that takes the block, for the error's text.
      takes_functions: Whether a function that returns a module is valid too.
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
