"""NNX modules as arrays: reading and writing their state, and a call of them as a pure function.

Flax changes variables in place. A list of layers and a checkpointed call read the arrays of all
variables (`flat_state`, `values_of`), run `pure_call`, and write back the replaced arrays.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

# Arguments of a call that hold variables; the layers of a list may share them.
_NODES = (nnx.Module, nnx.Rngs, nnx.RngStream, nnx.Variable)


def nodes_apart(tree) -> tuple[list, list, Callable[[list, list], Any]]:
    """Separates the leaves of a pytree that hold variables from the other leaves.

    Returns:
      `(nodes, others, merge)`: the modules and other nodes; all leaves, with None in the place of a
      node; and `merge(nodes, others)`, which returns the pytree.
    """
    is_node = lambda leaf: isinstance(leaf, _NODES)
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_node)
    places = [place for place, leaf in enumerate(leaves) if is_node(leaf)]

    def merge(nodes: list, others: list):
        merged = list(others)
        for place, node in zip(places, nodes, strict=True):
            merged[place] = node
        return jax.tree.unflatten(structure, merged)

    others = [None if is_node(leaf) else leaf for leaf in leaves]
    return [leaves[place] for place in places], others, merge


def is_variable(x) -> bool:
    """Whether a value is a variable of NNX, for `jax.tree.map(is_leaf=...)`."""
    return isinstance(x, nnx.Variable)


def dotted(path: Sequence) -> str:
    """Returns a path of Flax as text, such as `"mlp.kernel"`."""
    return ".".join(map(str, path))


def flat_state(whole: list | nnx.Module) -> list[tuple]:
    """Returns the paths and variables of a module, or of a list of modules."""
    return list(nnx.to_flat_state(nnx.state(whole)))


def values_of(state: list[tuple]) -> list[list[jax.Array]]:
    """Returns the arrays of each variable of a flat state."""
    return [jax.tree.leaves(variable) for _, variable in state]


def with_values(state: list[tuple], values: Mapping[int, list]):
    """Returns the variables at some places of a flat state with other values, as a state."""
    made = [
        (state[place][0], jax.tree.unflatten(jax.tree.structure(state[place][1]), leaves))
        for place, leaves in values.items()
    ]
    return nnx.from_flat_state(made)


def pure_call(nodes: list, use: Callable) -> Callable:
    """Returns `use(nodes, *inputs)` as a pure function of the nodes' values.

    Args:
      nodes: Modules and other nodes.
      use: `use(nodes, *inputs) -> result`, which may change variables of the nodes in place.

    Returns:
      `pure(values, *inputs) -> (result, values)`: takes the values of the nodes' variables, and
      returns them as they are after the call.
    """
    graph, state = nnx.split(nodes)[0], flat_state(nodes)

    def pure(values: list, *inputs):
        made = nnx.merge(graph, with_values(state, dict(enumerate(values))))
        before = nnx.split(made)[0]
        result = use(made, *inputs)
        after = flat_state(made)
        _check_made(state, after, before == nnx.split(made)[0])
        return result, values_of(after)

    return pure


def replaced_places(before: list[list], after: list[list]) -> list[int]:
    """Returns the places of the variables whose arrays were replaced."""
    pairs = enumerate(zip(before, after, strict=True))
    return [place for place, (old, new) in pairs if [*map(id, old)] != [*map(id, new)]]


def _check_made(before: list[tuple], after: list[tuple], same_graph: bool):
    """Raises `ValueError` if a call made variables, or changed other attributes."""
    known = {path for path, _ in before}
    made = [dotted(path[1:]) for path, _ in after if path not in known]
    if made or not same_graph:
        raise ValueError(
            f"a layer {'makes ' + ', '.join(made) if made else 'changes an attribute'} when it is "
            "called, which checkpointing does not keep; return it beside the carry (out=0 has it "
            "stacked), or make an nnx.Variable for it before"
        )
