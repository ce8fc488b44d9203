"""What users hand to the adapters: a class of blocks, and a call's arrays and Python values.

`jit`, `scan` and `checkpoint` turn every number they are handed into a traced array, and then
`if train:` fails inside. The adapters hand arrays over and leave Python values (`True`, `"gelu"`,
a function) as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


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


def check_class(block, module: type, taker: str):
    """Raises `ValueError` for a block that is a module rather than what makes one.

    Args:
      block: What the user gave for it.
      module: The class of the library's modules.
      taker: What takes the block, for the text.
    """
    if isinstance(block, module):
        raise ValueError(
            f"{taker} takes the class {type(block).__name__} or a functools.partial of it, not an "
            "instance; it makes the blocks by itself"
        )
    if not callable(block):
        raise ValueError(
            f"{taker} takes a module class or a functools.partial of one, not {block!r}"
        )


def _is_array(leaf) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic) or hasattr(leaf, "__jax_array__")
