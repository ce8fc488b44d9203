"""Flax NNX adapters: a module class in, a rematerialized stack out; or a list of modules as it is.

    self.layers = jaxckpt.nnx.Stack(Block, 28, remat="sqrt", rngs=rngs)
    x = self.layers(x, mask, deterministic=True)

    x = jaxckpt.nnx.run(self.layers, x, mask, remat="sqrt")      # self.layers is a list

A `Stack` is an NNX module like any other (`nnx.jit`, `nnx.grad`, `nnx.Optimizer`, `nnx.state`,
`eval()`), and its state does not depend on the plan. A block has only parameters and random
streams; batch statistics, caches and sown values are refused. A list keeps what it has: its layers'
parameters, their metadata, random streams and other state.
"""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Not as `nnx`: `jaxckpt.nnx` would then name Flax's module.
from flax import nnx as nn
from flax.nnx import spmd
from jax.core import Tracer

from jaxckpt.plans import Plan, PlanError
from jaxckpt.plans.errors import shown
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms.arguments import apart, check_class, part, put
from jaxckpt.transforms.checks import check_carry
from jaxckpt.transforms.layers import check_alike, check_layers, run_rows
from jaxckpt.transforms.policies import plan_and_policy
from jaxckpt.transforms.scan import scan
from jaxckpt.transforms.traced_block import first_block

# The name of the stacked axis in partition specs; None, because the axis is not sharded.
_AXIS = {nn.PARTITION_NAME: None}
# Metadata that marks variables whose partition spec has the stacked axis. `nnx.update` may bring
# values with the metadata of single blocks, whose specs lack this axis.
_STACKED = "jaxckpt_stacked"

# Advice on state, by the name of its class.
_CURES = {
    "BatchStat": "use a layer without state (LayerNorm or GroupNorm instead of BatchNorm)",
    "Cache": "decode with a loop over blocks, which needs no gradients and so no checkpointing",
    "Intermediate": "return what is sown beside the carry (out=0 has it stacked)",
}
_CURE = "put it into the carry, make it an nnx.Param if it is learned, or a plain array if fixed"


class Stack(nn.Module):
    """L equal NNX blocks under a plan; their variables are stacked `[L, ...]` in `blocks`.

    Block `i` of `stack.blocks.mlp.kernel` is its row `i`. Every block has random streams of its own
    and draws the same numbers as in a loop. Recomputation repeats them; the next call draws others.
    `remat` and `unroll` may be assigned at any time.

    Attributes:
      blocks: One block whose variables and arrays hold all blocks, stacked.
      num_blocks: The number of blocks, L.
      remat: A plan or its text, or a policy of `jax.checkpoint`.
      unroll: Blocks unrolled in one trip of a loop.
      out: The place of the carry in a block's result; None if the result is the carry.

    Example:
      >>> import functools, jax, jax.numpy as jnp, jaxckpt
      >>> from flax import nnx
      >>> block = functools.partial(nnx.Linear, 8, 8)
      >>> stack = jaxckpt.nnx.Stack(block, 12, remat="log", rngs=nnx.Rngs(0))
      >>> grads = nnx.grad(lambda stack: stack(jnp.ones([4, 8])).sum())(stack)
      >>> jax.tree.leaves(jax.tree.map(jnp.shape, grads["blocks"]["kernel"]))
      [12, 8, 8]
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        num_blocks: int,
        *,
        remat: str | Plan | Callable = "full",
        unroll: int = 1,
        out: int | str | Callable | None = None,
        rngs: nn.Rngs,
    ):
        """Makes the blocks.

        Args:
          block: An NNX module class, or a `functools.partial` of one, called with `rngs=` alone.
          num_blocks: The number of blocks, L.
          remat: A plan or its text, or a policy of `jax.checkpoint`.
          unroll: Blocks unrolled in one trip of a loop.
          out: The place of the carry in a block's result: an index, a key, or a function. The rest
            of a tuple or dict comes back stacked, `[L, ...]`. None if the result is the carry.
          rngs: The random streams; each is split into one key per block.

        Raises:
          PlanError: The plan does not parse or does not fit L blocks.
          ValueError: A block has state beside parameters and random streams.
        """
        check_class(block, nn.Module, "nnx.Stack", takes_functions=True)
        if isinstance(num_blocks, bool) or not isinstance(num_blocks, int):
            raise PlanError(f"num_blocks is a whole number of blocks, not {num_blocks!r}")
        plan_and_policy(remat)[0].bind(num_blocks)
        self.num_blocks = num_blocks
        self.remat = remat
        self.unroll = unroll
        self.out = out
        self.blocks = _make_blocks(block, _split(rngs, num_blocks), num_blocks)

    def __call__(self, carry, *consts, **named):
        """Runs the blocks one after another.

        Args:
          carry: The first block's input, any pytree of arrays; `block(carry, *consts, **named)`
            returns a carry with this structure, these shapes and these dtypes.
          *consts: Handed to every block. Arrays get gradients; Python values, such as `True`, stay
            Python values.
          **named: Keyword arguments for every block, such as `deterministic=True`. The streams of
            `rngs=nnx.Rngs(...)` are split, so that each block gets its own.

        Returns:
          The last block's carry; with `out`, the result of a block, its rest stacked.

        Raises:
          PlanError: The plan does not parse, does not fit L blocks, or names what no block has.
          ValueError: A block changes its carry, or keeps or changes state beside parameters and
            random streams; or `unroll` is no positive whole number.
        """
        _check_state(self.blocks)
        graph, counts, rest = nn.split(self.blocks, nn.RngCount, ...)
        # The index gives a length to blocks that have neither parameters nor keys.
        rows = {"counts": counts, "rest": rest, "index": jnp.arange(self.num_blocks)}
        rows["keys"], named = _split_keys(consts, named, self.num_blocks)
        arrays, merge = apart((consts, named))
        run = functools.partial(_run_block, graph, merge, self.out)
        drawn = _drawn_streams(run, carry, rows, arrays)

        def apply(carry, row):
            carry, rest, draws = run(carry, row, arrays)
            return carry, (rest, {i: draws[i] for i in drawn})

        carry, (rest, draws) = scan(apply, carry, rows, remat=self.remat, unroll=self.unroll)
        if drawn:  # without draws nothing is written, so the call may be under any transform
            leaves, tree = jax.tree.flatten(counts)
            most = {i: number.max() for i, number in draws.items()}
            leaves = [leaf + most.get(i, 0) for i, leaf in enumerate(leaves)]
            nn.update(self.blocks, jax.tree.unflatten(tree, leaves))
        return put(carry, rest, self.out)


def _split_keys(consts, named: dict, num_blocks: int) -> tuple[dict[str, jax.Array], dict]:
    """Returns one key per block from every stream of the call's `rngs`, and the other keywords."""
    named = dict(named)
    rngs = named.pop("rngs", None)
    if any(isinstance(value, nn.Rngs | nn.RngStream) for value in (*consts, *named.values())):
        raise ValueError(
            "random streams are handed to a stack as rngs=nnx.Rngs(...), or every block would "
            "draw the same"
        )
    return ({} if rngs is None else _split(rngs, num_blocks)), named


def _split(rngs: nn.Rngs, num_blocks: int) -> dict[str, jax.Array]:
    """Returns one key per block from every stream."""
    if not isinstance(rngs, nn.Rngs):
        raise ValueError(
            f"rngs is an nnx.Rngs, whose streams are split over the blocks, not {rngs!r}"
        )
    return {name: jax.random.split(stream(), num_blocks) for name, stream in rngs.items()}


def _make_blocks(
    block: Callable[..., nn.Module], keys: dict[str, jax.Array], num_blocks: int
) -> nn.Module:
    """Returns a block whose state is stacked from one block for each row of `keys`."""
    graphs = []
    jax.eval_shape(
        functools.partial(_check_unshared, block), {n: key[0] for n, key in keys.items()}
    )

    def make_one(keys):
        made = block(rngs=nn.Rngs(**keys))
        _check_state(made)
        graph, state = nn.split(made)
        _check_arrays(made, state)
        graphs.append(graph)
        return state

    state = jax.vmap(make_one, axis_size=num_blocks)(keys)
    return nn.merge(graphs[0], _with_axis(state))


def _with_axis(state):
    """Returns the blocks' state with the stacked axis added to its partition specs."""
    add = lambda x: _marked(spmd.add_axis(x, 0, _AXIS), True) if _is_variable(x) else x
    return jax.tree.map(add, state, is_leaf=_is_variable)


def _without_axis(state):
    """Returns one block's state with the stacked axis removed from its partition specs."""
    has_axis = lambda x: _is_variable(x) and x.get_metadata().get(_STACKED)
    remove = lambda x: _marked(spmd.remove_axis(x, 0, _AXIS), False) if has_axis(x) else x
    return jax.tree.map(remove, state, is_leaf=_is_variable)


def _marked(variable: nn.Variable, stacked: bool) -> nn.Variable:
    if hasattr(variable, "set_metadata"):
        variable.set_metadata(_STACKED, stacked)
    else:  # Flax 0.11
        setattr(variable, _STACKED, stacked)
    return variable


def _is_variable(x) -> bool:
    return isinstance(x, nn.Variable)


def _run_block(graph, merge: Callable, out, carry, row, arrays):
    """Returns one block's carry, the rest of its result, and each stream's number of draws.

    The number is None for a stream that the block did not draw from.

    Args:
      graph: The stacked blocks' graph definition.
      merge: From the call's arrays to all its arguments, from `apart`.
      out: The place of the carry in the block's result.
      carry: The block's input.
      row: The block's state, keys and index.
      arrays: The arrays among the call's arguments.
    """
    # Flax changes variables in place, so they are copied.
    state = jax.tree.map(lambda x: x, (row["counts"], row["rest"]))
    block = nn.merge(graph, *_without_axis(state))
    consts, named = merge(arrays)
    if row["keys"]:
        named = {**named, "rngs": nn.Rngs(**row["keys"])}
    graph, _, before = nn.split(block, nn.RngCount, ...)
    before = _arrays(before)
    carry, rest = part(block(carry, *consts, **named), out)
    _check_state(block)
    graph_after, counts, after = nn.split(block, nn.RngCount, ...)
    _check_unchanged(before, _arrays(after), graph == graph_after)
    pairs = zip(jax.tree.leaves(row["counts"]), jax.tree.leaves(counts), strict=True)
    # The count of a stream without draws is still the same object.
    return carry, rest, [None if new is old else new - old for old, new in pairs]


def _drawn_streams(run: Callable, carry, rows, arrays) -> list[int]:
    """Returns the positions of the streams that a block draws from; checks its carry, too."""
    drawn = []

    def call(carry, row, *arrays):
        carry, _, draws = run(carry, row, arrays)
        drawn[:] = [i for i, count in enumerate(draws) if count is not None]
        return carry

    check_carry(carry, jax.eval_shape(call, carry, first_block(rows), *arrays))
    return drawn


def _arrays(state) -> dict[str, list[jax.Array]]:
    """Returns the arrays of a state by their paths."""
    return {
        ".".join(map(str, path)): jax.tree.leaves(variable)
        for path, variable in nn.to_flat_state(state)
    }


def _check_unchanged(before: dict, after: dict, same_graph: bool):
    """Raises `ValueError` if a call changed arrays or attributes of its block."""
    changed = [
        path
        for path, leaves in after.items()
        if [*map(id, leaves)] != [*map(id, before.get(path, ()))]
    ]
    if changed or not same_graph:
        raise ValueError(
            f"the block changes {', '.join(changed) or 'an attribute'} when it is called, which a "
            "stack of checkpointed blocks does not keep; put it into the carry"
        )


def _check_unshared(block: Callable[..., nn.Module], keys):
    """Raises `ValueError` if blocks would share a variable that was made outside of them."""
    one, other = (block(rngs=nn.Rngs(**keys)) for _ in range(2))
    seen = {id(node) for _, node in nn.iter_graph(other)}
    for path, node in nn.iter_graph(one):
        if id(node) in seen and isinstance(node, nn.Variable | nn.Module):
            raise ValueError(
                f"the block's {'.'.join(map(str, path))} is made outside of the block, and the "
                "blocks of a stack would not share it; call it outside and hand its output over, "
                "or make it in the block"
            )


def _check_arrays(block: nn.Module, state):
    """Raises `ValueError` if Flax treats an array of a block as a static attribute."""
    kept = {id(leaf) for leaf in jax.tree.leaves(state)}
    for path, node in nn.iter_graph(block):
        attributes = vars(node).items() if isinstance(node, nn.Module) else ()
        for name, value in attributes:
            leaves = [x for x in jax.tree.leaves(value) if isinstance(x, Tracer)]
            if any(id(leaf) not in kept for leaf in leaves):
                where = ".".join(map(str, (*path, name)))
                raise ValueError(
                    f"Flax takes the array {where} of the block for a static attribute, which "
                    f"differs from block to block here; write self.{name} = nnx.data(array)"
                )


def _check_state(block: nn.Module):
    """Raises `ValueError` if a block has variables that are neither parameters nor random."""
    _, _, others, _ = nn.split(block, (nn.Param, nn.RngState), nn.Variable, ...)
    found = {
        ".".join(map(str, path)): type(variable).__name__
        for path, variable in nn.to_flat_state(others)
        if jax.tree.leaves(variable)  # `nnx.capture` gives every module an empty variable
    }
    if not found:
        return
    kinds = sorted(set(found.values()))
    cures = dict.fromkeys(_CURES.get(kind, _CURE) for kind in kinds)
    raise ValueError(
        f"the block keeps state in {', '.join(found)} ({', '.join(kinds)}), which a stack of "
        f"checkpointed blocks does not carry; {'; '.join(cures)}"
    )


# What a call may be handed beside arrays and Python values, and a list of layers may share.
_NODES = (nn.Module, nn.Rngs, nn.RngStream, nn.Variable)
# Attributes that Flax keeps for itself.
_FLAX = ("_pytree__", "_object__")


def run(
    layers: Sequence[nn.Module],
    carry,
    *args,
    out: int | str | Callable | None = None,
    each: Mapping[str, Any] | None = None,
    ignore: str | Sequence[str] = (),
    remat: str | Plan | Schedule | Callable = "sqrt",
    unroll: int = 1,
    **named,
):
    """Runs a list of equal NNX modules as it is, checkpointed by a plan.

    The layers stay what they are: paths of parameters, metadata, random streams. A call draws and
    changes what a Python loop over the list would, once: counters of dropout, batch statistics.

    Args:
      layers: An `nnx.List` or a Python list of modules of one class, of equal shapes and equal
        Python values.
      carry: The first layer's input; `layer(carry, *args, **named, **each_i)` returns its like, or
        has it where `out` says.
      *args: Handed to every layer. Arrays get gradients, Python values and None stay what they
        are, and modules and `nnx.Rngs` are shared by the layers.
      out: Where the carry is in what a layer returns: an index, a key, or a function. The rest of a
        tuple or dict comes back stacked, `[L, ...]`.
      each: What differs from layer to layer beside the layer, by keyword, `[L, ...]`.
      ignore: Names of attributes that may differ between equal layers, such as `"layer_idx"`;
        every layer is run with the first one's.
      remat: A plan or its text, a schedule for L blocks, or a policy of `jax.checkpoint`.
      unroll: Layers unrolled in one trip of the loop. With L or more there is no loop and no copy
        of the parameters, where `out` is None.
      **named: As `args`, by keyword.

    Returns:
      The last layer's carry; with `out`, what a layer returns, its rest stacked.

    Raises:
      PlanError: As `jaxckpt.scan_blocks`.
      ValueError: No layers, no modules, layers that differ (what differs is named), an `out` that
        is not there, a layer that changes its carry or makes variables when it is called.

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
        if not isinstance(layer, nn.Module):
            raise ValueError(
                f"nnx.run takes NNX modules, and layers[{place}] is {shown(layer)}; jaxckpt.run "
                "takes pytrees and jaxckpt.linen.run takes Linen modules"
            )
    check_alike(layers, ignore, _attributes)
    leaves, tree = jax.tree.flatten((args, named), is_leaf=lambda x: isinstance(x, _NODES))
    at = [place for place, leaf in enumerate(leaves) if isinstance(leaf, _NODES)]
    wholes = [[layer, *(leaves[place] for place in at)] for layer in layers]
    states = [_flat_state(whole) for whole in wholes]
    graph, first = nn.split(wholes[0])[0], states[0]
    for place, state in enumerate(states):
        if [path for path, _ in state] != [path for path, _ in first]:
            raise ValueError(
                f"layers[0] and layers[{place}] share different parts; nnx.run takes equal layers"
            )

    def call(carry, values: list, each_i):
        """Returns a layer's carry, the rest of its result, and its variables' values."""
        layer, *nodes = whole = nn.merge(graph, _with_values(first, dict(enumerate(values))))
        given, before = list(leaves), nn.split(whole)[0]
        for place, node in zip(at, nodes, strict=True):
            given[place] = node
        args, named = jax.tree.unflatten(tree, given)
        carry, rest = part(layer(carry, *args, **named, **each_i), out)
        after = _flat_state(whole)
        _check_made(first, after, before == nn.split(whole)[0])
        return carry, rest, _values(after)

    rows = [_values(state) for state in states]
    shared, own = _changed(call, carry, rows[0], each, wholes)

    def step(state, row, each_i):
        carry, held = state
        values = [held.get(place, value) for place, value in enumerate(row)]
        carry, rest, after = call(carry, values, each_i)
        held, made = ({place: after[place] for place in places} for places in (shared, own))
        return (carry, held), (rest, made)

    held = {place: rows[0][place] for place in shared}
    made = run_rows(
        step,
        (carry, held),
        rows,
        each,
        has_rest=out is not None,
        remat=remat,
        unroll=unroll,
    )
    (carry, held), (rest, changed) = made
    if held or changed:  # a call that changes nothing can be made anywhere
        for i, (whole, state) in enumerate(zip(wholes, states, strict=True)):
            mine = jax.tree.map(lambda x, i=i: x[i], changed)
            nn.update(whole, _with_values(state, held | mine))
    return put(carry, rest, out)


def _changed(call: Callable, carry, row: list, each, wholes: list) -> tuple[list[int], list[int]]:
    """Returns which variables a layer changes when it is called; its carry is checked on the way.

    Args:
      call: `call(carry, values, each_i)`, which returns values too, among others.
      carry: The first layer's input.
      row: The first layer's values.
      each: What differs from layer to layer beside.
      wholes: Every layer, with what all are handed.

    Returns:
      The places of the variables that all layers share, and the places of the variables of which
      each layer has its own.

    Raises:
      ValueError: The carry changes, or some of the layers share what they change.
    """
    found = []

    def look(carry, row, each_i):
        carry, _, after = call(carry, row, each_i)
        found.extend(
            place
            for place, (old, new) in enumerate(zip(row, after, strict=True))
            if [*map(id, old)] != [*map(id, new)]
        )
        return carry

    check_carry(carry, jax.eval_shape(look, carry, row, first_block(each)))
    variables = [
        {path: node for path, node in nn.iter_graph(whole) if _is_variable(node)}
        for whole in wholes
    ]
    owners = collections.Counter(id(node) for one in variables for node in one.values())
    paths = [path for path, _ in _flat_state(wholes[0])]
    shared, own = [], []
    for place in found:
        nodes = [one[paths[place]] for one in variables]
        if all(node is nodes[0] for node in nodes):
            shared.append(place)
        elif any(owners[id(node)] > 1 for node in nodes):
            name = ".".join(map(str, paths[place][1:]))
            raise ValueError(
                f"some of the layers share {name}, which changes when they are called; it may "
                "belong to one layer, or to all of them"
            )
        else:
            own.append(place)
    return shared, own


def _flat_state(whole: list) -> list[tuple]:
    """Returns the paths and variables of a list of modules."""
    return list(nn.to_flat_state(nn.state(whole)))


def _values(state: list[tuple]) -> list[list[jax.Array]]:
    return [jax.tree.leaves(variable) for _, variable in state]


def _with_values(state: list[tuple], values: Mapping[int, list]):
    """Returns the variables at some places of a flat state with other values, as a state."""
    made = [
        (state[place][0], jax.tree.unflatten(jax.tree.structure(state[place][1]), leaves))
        for place, leaves in values.items()
    ]
    return nn.from_flat_state(made)


def _check_made(before: list[tuple], after: list[tuple], same_graph: bool):
    """Raises `ValueError` if a call made variables, or changed other attributes."""
    known = {path for path, _ in before}
    made = [".".join(map(str, path[1:])) for path, _ in after if path not in known]
    if made or not same_graph:
        raise ValueError(
            f"a layer {'makes ' + ', '.join(made) if made else 'changes an attribute'} when it is "
            "called, which a loop of layers does not keep; return it beside the carry (out=0 has "
            "it stacked), or make an nnx.Variable for it before"
        )


def _attributes(value) -> dict | None:
    """Returns what two equal layers have in common: a node's attributes, a variable's metadata."""
    if isinstance(value, nn.Variable):
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
