"""`run`: an unchanged list of NNX modules under a plan that counts the modules.

    x = jaxckpt.nnx.run(self.layers, x, mask, remat="sqrt")      # self.layers is a list

The list keeps its layers' parameters, metadata, random streams and other state. If layers share and
change a variable, such as the counter of one `nnx.Rngs`, each layer continues from the value that
the previous layer left.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxckpt.nnx.state import (
    dotted,
    flat_state,
    is_variable,
    nodes_apart,
    pure_call,
    replaced_places,
    values_of,
    with_values,
)
from jaxckpt.plans import Plan
from jaxckpt.plans.errors import shown
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms.arguments import part, put
from jaxckpt.transforms.checks import check_carry
from jaxckpt.transforms.layers import (
    KINDS,
    check_layers,
    first_places,
    in_order,
    kinds_of,
    run_rows,
)
from jaxckpt.transforms.traced_block import first_block

# The beginnings of attributes that only Flax uses.
_FLAX = ("_pytree__", "_object__")


def run(
    layers: Sequence[nnx.Module],
    carry,
    *args,
    out: int | str | Callable | None = None,
    each: Mapping[str, Any] | None = None,
    ignore: str | Sequence[str] = (),
    remat: str | Plan | Schedule | Callable = "sqrt",
    unroll: int = 1,
    **named,
):
    """Runs an unchanged list of NNX modules, checkpointed by a plan that counts the modules.

    Paths of parameters, metadata and random streams stay unchanged. A call draws the random numbers
    of a Python loop over the list, and changes variables once as the loop does: counters of
    dropout, batch statistics.

    Args:
      layers: An `nnx.List` or a Python list of modules of one or several kinds. Layers of one kind
        have one class, equal shapes and equal Python values.
      carry: The first layer's input. `layer(carry, *args, **named, **each_i)` returns a carry of
        the same structure, shapes and dtypes, or a result that holds the carry at `out`.
      *args: Passed to every layer. Arrays get gradients. Python values and None are passed
        unchanged. Layers share modules and `nnx.Rngs`.
      out, each, ignore, remat, unroll: As for `jaxckpt.run`.
      **named: Passed to every layer by keyword.

    Returns:
      The last layer's carry; with `out`, the result of a layer with its other parts stacked.

    Raises:
      PlanError: As for `jaxckpt.scan_blocks`.
      ValueError: The list is empty, an element is not a module, all layers differ (the error names
        the difference), `out` is not in the result, or a layer changes the carry's shapes or makes
        variables when it is called.

    Example:
      >>> import jax.numpy as jnp, jaxckpt
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(6)])
      >>> loss = lambda layers: jaxckpt.nnx.run(layers, jnp.ones([4, 8]), remat="log").sum()
      >>> nnx.grad(loss)(layers)[5]["kernel"].shape
      (8, 8)
    """
    layers, each = check_layers(layers, each, "nnx.run takes a list of NNX modules first, then")
    for place, layer in enumerate(layers):
        if not isinstance(layer, nnx.Module):
            raise ValueError(
                f"nnx.run takes NNX modules, and layers[{place}] is {shown(layer)}; jaxckpt.run "
                "takes pytrees and jaxckpt.linen.run takes Linen modules"
            )
    order = kinds_of(layers, ignore, _attributes)
    given, others, merge = nodes_apart((args, named))
    wholes = [[layer, *given] for layer in layers]
    states = [flat_state(whole) for whole in wholes]
    for i, (state, kind) in enumerate(zip(states, order, strict=True)):
        k = order.index(kind)
        if [path for path, _ in state] != [path for path, _ in states[k]]:
            raise ValueError(f"layers[{k}] and layers[{i}] share different parts; nnx.{KINDS}")
    rows = [values_of(state) for state in states]
    firsts = first_places(order)

    def use(nodes: list, carry, each_i):
        layer, *given = nodes
        args, named = merge(given, others)
        return part(layer(carry, *args, **named, **each_i), out)

    calls = [pure_call(wholes[k], use) for k in firsts]
    changed = [
        _changed(call, carry, rows[k], each, f"layers[{k}]")
        for call, k in zip(calls, firsts, strict=True)
    ]
    shared, own = _owned(changed, wholes, states, order)

    def step_of(kind: int) -> Callable:
        def step(state, row, each_i):
            carry, held = state
            values = [held.get(shared[kind].get(at), value) for at, value in enumerate(row)]
            (carry, rest), after = calls[kind](values, carry, each_i)
            held = held | {name: after[at] for at, name in shared[kind].items()}
            return (carry, held), (rest, {at: after[at] for at in own[kind]})

        return step

    held = {
        name: rows[k][at]
        for k, names in zip(firsts, shared, strict=True)
        for at, name in names.items()
    }
    steps, has_rest = list(map(step_of, range(len(calls)))), out is not None
    (carry, held), ys = run_rows(
        steps, (carry, held), rows, each, order, has_rest=has_rest, remat=remat, unroll=unroll
    )
    for i, (whole, state, kind) in enumerate(zip(wholes, states, order, strict=True)):
        row = order[:i].count(kind)
        mine = jax.tree.map(lambda x, row=row: x[row], ys[kind][1])
        mine |= {at: held[name] for at, name in shared[kind].items()}
        if mine:  # without changes no update is needed, which NNX refuses at another trace level
            nnx.update(whole, with_values(state, mine))
    return put(carry, in_order([rest for rest, _ in ys], order), out)


def _changed(call: Callable, carry, row: list, each, name: str) -> list[int]:
    """Returns the places of the variables that a layer changes when it is called.

    Args:
      call: `call(values, carry, each_i)`, which returns `((carry, rest), values)`.
      carry: The layer's input.
      row: The layer's values.
      each: Keyword arguments that differ from layer to layer, `[L, ...]`.
      name: The layer's name in errors.

    Raises:
      ValueError: The layer changes the carry's structure, shapes or dtypes.
    """
    found = []

    def look(carry, row, each_i):
        (carry, _), after = call(row, carry, each_i)
        found.extend(replaced_places(row, after))
        return carry

    check_carry(carry, jax.eval_shape(look, carry, row, first_block(each)), name)
    return found


def _owned(
    changed: list[list[int]], wholes: list, states: list[list], order: Sequence[int]
) -> tuple[list[dict[int, str]], list[list[int]]]:
    """Returns the changed variables that layers share, and the changed variables of single layers.

    Args:
      changed: For each kind of layer, the places of the variables that a layer changes.
      wholes: Every layer, together with the arguments that all layers share.
      states: The flat state of each element of `wholes`.
      order: The kind of each layer.

    Returns:
      Two lists. The first has, for each kind, a mapping from the places of shared variables to
      names; a variable has one name in all kinds. The second has, for each kind, the places of
      variables that belong to one layer.

    Raises:
      ValueError: Some layers of a kind share a changed variable, and other layers do not.
    """
    ids = []
    for whole, state in zip(wholes, states, strict=True):
        nodes = {path: node for path, node in nnx.iter_graph(whole) if is_variable(node)}
        ids.append([id(nodes[path]) for path, _ in state])
    users = collections.Counter(one for row in ids for one in row)
    columns = [
        list(zip(*(row for row, one in zip(ids, order, strict=True) if one == kind), strict=True))
        for kind in range(len(changed))
    ]
    is_one = lambda column: len(set(column)) == 1
    names: dict[int, str] = {}
    for of_kind, places in zip(columns, changed, strict=True):
        for place in places:
            if is_one(of_kind[place]) and users[of_kind[place][0]] > 1:
                names.setdefault(of_kind[place][0], str(len(names)))
    shared, own = [], []
    for kind, (of_kind, places) in enumerate(zip(columns, changed, strict=True)):
        shared.append({at: names[c[0]] for at, c in enumerate(of_kind) if c[0] in names})
        own.append([place for place in places if place not in shared[-1]])
        for at, column in enumerate(of_kind):
            is_split = at in own[-1] and any(users[one] > 1 for one in column)
            if is_split or (not is_one(column) and not names.keys().isdisjoint(column)):
                path, _ = states[order.index(kind)][at]
                raise ValueError(
                    f"some of the layers share {dotted(path[1:])}, which changes when "
                    "they are called; it may belong to one layer, or to all of a kind"
                )
    return shared, own


def _attributes(value) -> dict | None:
    """Returns the values that are equal in equal layers: attributes, or a variable's metadata."""
    if isinstance(value, nnx.Variable):
        return {**value.get_metadata(), "value": jax.tree.leaves(value)[0]}
    if isinstance(value, Mapping):
        return dict(value)
    attributes = getattr(value, "__dict__", {})
    if not any(name.startswith(_FLAX) for name in attributes):
        return None
    # Flax 0.11 keeps initializers, which differ in every layer. A call does not use initializers.
    is_init = lambda name: name.endswith("_init") and callable(attributes[name])
    names = [name for name in attributes if not name.startswith(_FLAX) and not is_init(name)]
    return {name: attributes[name] for name in names}
