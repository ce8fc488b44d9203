"""`run`: a list of NNX modules as it is, under a plan that counts them.

    x = jaxckpt.nnx.run(self.layers, x, mask, remat="sqrt")      # self.layers is a list

The list keeps what it has: its layers' parameters, their metadata, random streams and other state.
What layers share and change, such as one `nnx.Rngs`, goes on from layer to layer.
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

# Attributes that Flax keeps for itself.
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
    """Runs a list of NNX modules as it is, checkpointed by a plan that counts them.

    The layers stay what they are: paths of parameters, metadata, random streams. A call draws and
    changes what a Python loop over the list would, once: counters of dropout, batch statistics.

    Args:
      layers: An `nnx.List` or a Python list of modules, of one kind or of several. Within a kind
        all have one class, equal shapes and equal Python values.
      carry: The first layer's input; `layer(carry, *args, **named, **each_i)` returns its like, or
        has it where `out` says.
      *args: Handed to every layer. Arrays get gradients, Python values and None stay what they
        are, and modules and `nnx.Rngs` are shared by the layers.
      out, each, ignore, remat, unroll: As for `jaxckpt.run`.
      **named: As `args`, by keyword.

    Returns:
      The last layer's carry; with `out`, what a layer returns, its rest stacked.

    Raises:
      PlanError: As `jaxckpt.scan_blocks`.
      ValueError: No layers, no modules, layers that all differ (what differs is named), an `out`
        that is not there, a layer that changes its carry or makes variables when it is called.

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
        if mine:  # a call that changes nothing can be made anywhere
            nnx.update(whole, with_values(state, mine))
    return put(carry, in_order([rest for rest, _ in ys], order), out)


def _changed(call: Callable, carry, row: list, each, name: str) -> list[int]:
    """Returns the places of the variables that a layer changes when it is called.

    Args:
      call: `call(values, carry, each_i)`, which returns a pair with the carry, and the values.
      carry: The layer's input.
      row: The layer's values.
      each: What differs from layer to layer beside.
      name: The layer's name for the user.

    Raises:
      ValueError: The carry changes.
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
    """Returns which of the variables that change are shared, and which belong to one layer.

    Args:
      changed: For each kind of layer, the places of the variables that it changes.
      wholes: Every layer, with what all are handed.
      states: The flat state of each.
      order: The kind of each layer.

    Returns:
      For each kind, a name for each place of a variable that layers share: the same name for the
      same variable. And for each kind, the places of the variables that belong to one layer.

    Raises:
      ValueError: Some layers of a kind share a variable that changes, and others do not.
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
    """Returns what two equal layers have in common: a node's attributes, a variable's metadata."""
    if isinstance(value, nnx.Variable):
        return {**value.get_metadata(), "value": jax.tree.leaves(value)[0]}
    if isinstance(value, Mapping):
        return dict(value)
    attributes = getattr(value, "__dict__", {})
    if not any(name.startswith(_FLAX) for name in attributes):
        return None
    # Flax 0.11 keeps initializers, made anew for every layer; a call has no use for them.
    is_init = lambda name: name.endswith("_init") and callable(attributes[name])
    names = [name for name in attributes if not name.startswith(_FLAX) and not is_init(name)]
    return {name: attributes[name] for name in names}
