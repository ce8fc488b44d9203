"""Flax NNX adapters: a module class in, a rematerialized stack out; or a list of modules as it is.

    self.layers = jaxckpt.nnx.Stack(Block, 28, remat="sqrt", rngs=rngs)
    x = self.layers(x, mask, deterministic=True)

    x = jaxckpt.nnx.run(self.layers, x, mask, remat="sqrt")      # self.layers is a list

A `Stack` is an NNX module like any other (`nnx.jit`, `nnx.grad`, `nnx.Optimizer`, `nnx.state`,
`eval()`), and its state does not depend on the plan. Blocks that change variables beside their
random streams are refused, unless `carry=` names the variables' class, such as `nnx.BatchStat`. A
list keeps what it has: its layers' parameters, their metadata, random streams and other state.
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
from jaxckpt.transforms.layers import (
    KINDS,
    check_layers,
    first_places,
    in_order,
    kinds_of,
    run_rows,
)
from jaxckpt.transforms.policies import plan_and_policy
from jaxckpt.transforms.region import checkpointed, plan_of_one, replaced
from jaxckpt.transforms.scan import scan
from jaxckpt.transforms.traced_block import first_block

# The name of the stacked axis in partition specs; None, because the axis is not sharded.
_AXIS = {nn.PARTITION_NAME: None}
# Metadata that marks variables whose partition spec has the stacked axis. `nnx.update` may bring
# values with the metadata of single blocks, whose specs lack this axis.
_STACKED = "jaxckpt_stacked"

# Advice on state, by the name of its class.
_CURES = {
    "BatchStat": "give the stack carry=nnx.BatchStat, call eval() for fixed averages, or use a "
    "layer without state (LayerNorm or GroupNorm)",
    "Cache": "decode with a loop over blocks, which needs no gradients and so no checkpointing",
    "Intermediate": "return what is sown beside the carry (out=0 has it stacked)",
}
_CURE = "give the stack carry= with its class, or put it into the carry"


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
      carry: The classes of variables that a block may change.

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
        carry: type[nn.Variable] | Sequence[type[nn.Variable]] = (),
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
          carry: A class of variables that a block may change, such as `nnx.BatchStat`, or several.
            A block changes its own once a call, however often it is run again.
          rngs: The random streams; each is split into one key per block.

        Raises:
          PlanError: The plan does not parse or does not fit L blocks.
          ValueError: Blocks would share a variable, or `carry` is no class of variables.
        """
        check_class(block, nn.Module, "nnx.Stack", takes_functions=True)
        if isinstance(num_blocks, bool) or not isinstance(num_blocks, int):
            raise PlanError(f"num_blocks is a whole number of blocks, not {num_blocks!r}")
        plan_and_policy(remat)[0].bind(num_blocks)
        self.num_blocks = num_blocks
        self.remat = remat
        self.unroll = unroll
        self.out = out
        self.carry: tuple[type, ...] = (
            tuple(carry) if isinstance(carry, tuple | list) else (carry,)  # pyright: ignore
        )
        for kind in self.carry:
            if not (isinstance(kind, type) and issubclass(kind, nn.Variable)):
                raise ValueError(
                    f"carry is a class of nnx.Variable, such as nnx.BatchStat, not {shown(kind)}"
                )
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
          ValueError: A block changes its carry, or variables beside random streams that
            `self.carry` does not name; or `unroll` is no positive whole number.
        """
        graph, counts, rest = nn.split(self.blocks, nn.RngCount, ...)
        # The index gives a length to blocks that have neither parameters nor keys.
        rows = {"counts": counts, "rest": rest, "index": jnp.arange(self.num_blocks)}
        rows["keys"], named = _split_keys(consts, named, self.num_blocks)
        arrays, merge = apart((consts, named))
        run = functools.partial(_run_block, graph, merge, self.out, self.carry)
        drawn = _drawn_streams(run, carry, rows, arrays)

        def apply(carry, row):
            carry, rest, draws, changed = run(carry, row, arrays)
            return carry, (rest, {i: draws[i] for i in drawn}, changed)

        options = {"remat": self.remat, "unroll": self.unroll}
        carry, (rest, draws, changed) = scan(apply, carry, rows, **options)
        if drawn:  # without draws nothing is written, so the call may be under any transform
            leaves, tree = jax.tree.flatten(counts)
            most = {i: number.max() for i, number in draws.items()}
            leaves = [leaf + most.get(i, 0) for i, leaf in enumerate(leaves)]
            nn.update(self.blocks, jax.tree.unflatten(tree, leaves))
        if changed:
            state = _flat_state(self.blocks)
            places = [place for place, (path, _) in enumerate(state) if _name(path) in changed]
            values = {place: changed[_name(state[place][0])] for place in places}
            nn.update(self.blocks, _with_values(state, values))
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


def _run_block(graph, merge: Callable, out, kept: Sequence[type], carry, row, arrays):
    """Returns one block's carry, the rest of its result, its draws, and what it changed.

    Draws are a number for each stream, None for a stream that the block did not draw from. What it
    changed are the leaves of variables by path.

    Args:
      graph: The stacked blocks' graph definition.
      merge: From the call's arrays to all its arguments, from `apart`.
      out: The place of the carry in the block's result.
      kept: The classes of variables that a block may change.
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
    graph_after, counts, after = nn.split(block, nn.RngCount, ...)
    changed = _kept(before, after, graph == graph_after, kept)
    pairs = zip(jax.tree.leaves(row["counts"]), jax.tree.leaves(counts), strict=True)
    # The count of a stream without draws is still the same object.
    return carry, rest, [None if new is old else new - old for old, new in pairs], changed


def _drawn_streams(run: Callable, carry, rows, arrays) -> list[int]:
    """Returns the positions of the streams that a block draws from; checks its carry, too."""
    drawn = []

    def call(carry, row, *arrays):
        carry, _, draws, _ = run(carry, row, arrays)
        drawn[:] = [i for i, count in enumerate(draws) if count is not None]
        return carry

    check_carry(carry, jax.eval_shape(call, carry, first_block(rows), *arrays))
    return drawn


def _arrays(state) -> dict[str, list[jax.Array]]:
    """Returns the arrays of a state by their paths."""
    return {_name(path): jax.tree.leaves(variable) for path, variable in nn.to_flat_state(state)}


def _name(path: Sequence) -> str:
    return ".".join(map(str, path))


def _kept(before: dict, after, same_graph: bool, kept: Sequence[type]) -> dict[str, list]:
    """Returns the leaves of the variables that a call changed, by path.

    Args:
      before: The arrays of the block's variables, by path.
      after: The block's state after the call.
      same_graph: Whether the block's attributes are what they were.
      kept: The classes of variables that a block may change.

    Raises:
      ValueError: The call changed other variables, made variables, or changed attributes.
    """
    changed = {
        _name(path): variable
        for path, variable in nn.to_flat_state(after)
        if [*map(id, jax.tree.leaves(variable))] != [*map(id, before.get(_name(path), ()))]
    }
    refused = {
        path: type(variable).__name__
        for path, variable in changed.items()
        if path not in before or not isinstance(variable, tuple(kept))
    }
    if not refused and same_graph:
        return {path: jax.tree.leaves(variable) for path, variable in changed.items()}
    if not refused:
        raise ValueError(
            "the block changes an attribute when it is called, which a stack of checkpointed "
            "blocks does not keep; put it into the carry"
        )
    kinds = sorted(set(refused.values()))
    cures = dict.fromkeys(_CURES.get(kind, _CURE) for kind in kinds)
    raise ValueError(
        f"the block changes {', '.join(refused)} ({', '.join(kinds)}) when it is called, which a "
        f"stack of checkpointed blocks does not keep; {'; '.join(cures)}"
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
    """Runs a list of NNX modules as it is, checkpointed by a plan that counts them.

    The layers stay what they are: paths of parameters, metadata, random streams. A call draws and
    changes what a Python loop over the list would, once: counters of dropout, batch statistics.

    Args:
      layers: An `nnx.List` or a Python list of modules, of one kind or of several with at least two
        layers of each. Within a kind all have one class, equal shapes and equal Python values.
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
    order = kinds_of(layers, ignore, _attributes)
    leaves, tree = jax.tree.flatten((args, named), is_leaf=lambda x: isinstance(x, _NODES))
    at = [place for place, leaf in enumerate(leaves) if isinstance(leaf, _NODES)]
    wholes = [[layer, *(leaves[place] for place in at)] for layer in layers]
    states = [_flat_state(whole) for whole in wholes]
    for i, (state, kind) in enumerate(zip(states, order, strict=True)):
        k = order.index(kind)
        if [path for path, _ in state] != [path for path, _ in states[k]]:
            raise ValueError(f"layers[{k}] and layers[{i}] share different parts; nnx.{KINDS}")
    rows = [_values(state) for state in states]
    firsts = first_places(order)

    def use(nodes: list, carry, each_i):
        layer, given = nodes[0], list(leaves)
        for place, node in zip(at, nodes[1:], strict=True):
            given[place] = node
        args, named = jax.tree.unflatten(tree, given)
        return part(layer(carry, *args, **named, **each_i), out)

    calls = [_pure(wholes[k], use) for k in firsts]
    changed = [_changed(call, carry, rows[k], each) for call, k in zip(calls, firsts, strict=True)]
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
            nn.update(whole, _with_values(state, mine))
    return put(carry, in_order([rest for rest, _ in ys], order), out)


def _changed(call: Callable, carry, row: list, each) -> list[int]:
    """Returns the places of the variables that a layer changes when it is called.

    Args:
      call: `call(values, carry, each_i)`, which returns a pair with the carry, and the values.
      carry: The layer's input.
      row: The layer's values.
      each: What differs from layer to layer beside.

    Raises:
      ValueError: The carry changes.
    """
    found = []

    def look(carry, row, each_i):
        (carry, _), after = call(row, carry, each_i)
        found.extend(_replaced(row, after))
        return carry

    check_carry(carry, jax.eval_shape(look, carry, row, first_block(each)))
    return found


def _replaced(before: list[list], after: list[list]) -> list[int]:
    """Returns the places of the variables whose arrays are others than before."""
    pairs = enumerate(zip(before, after, strict=True))
    return [place for place, (old, new) in pairs if [*map(id, old)] != [*map(id, new)]]


def _pure(nodes: list, use: Callable) -> Callable:
    """Returns `pure(values, *inputs)`: what `use(nodes, *inputs)` returns, and the values after it.

    Args:
      nodes: Modules and other nodes; `values` are those of their variables.
      use: Calls them.
    """
    graph, state = nn.split(nodes)[0], _flat_state(nodes)

    def pure(values: list, *inputs):
        made = nn.merge(graph, _with_values(state, dict(enumerate(values))))
        before = nn.split(made)[0]
        result = use(made, *inputs)
        after = _flat_state(made)
        _check_made(state, after, before == nn.split(made)[0])
        return result, _values(after)

    return pure


def remat_of(
    block: type[nn.Module],
    plan: str | Plan | Callable,
    *,
    methods: Sequence[str] = ("__call__",),
    prevent_cse: bool = True,
):
    """A context in which each call of an NNX class is checkpointed, wherever its code is.

    As `jaxckpt.remat_of`. What a call changes, such as counters of dropout and batch statistics, is
    changed once.

    Args:
      block: The class.
      plan: `none`, `full`, or policies such as `"dots"`; or a policy of `jax.checkpoint`.
      methods: Names of the methods that are checkpointed.
      prevent_cse: As in `jax.checkpoint`; False inside a loop.

    Raises:
      PlanError: A plan for several blocks; or, at a call, a name that matches nothing in the block.
      ValueError: `block` is no class of NNX modules, it has no such method, or no module of the
        class was called; or a call makes variables.

    Example:
      >>> import jax.numpy as jnp, jaxckpt
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), jnp.tanh)
      >>> def loss(model):
      ...     with jaxckpt.nnx.remat_of(nnx.Linear, "full"):
      ...         return model(jnp.ones([4, 8])).sum()
      >>> nnx.grad(loss)(model)["layers"][0]["kernel"].shape
      (8, 8)
    """
    if not (isinstance(block, type) and issubclass(block, nn.Module)):
        raise ValueError(f"nnx.remat_of takes a class of NNX modules, not {shown(block)}")
    bound, given = plan_of_one(plan, "nnx.remat_of wraps one", "nnx.Stack takes every plan")

    def wrap(method: Callable) -> Callable:
        def call(*args, **named):
            leaves, tree = jax.tree.flatten((args, named), is_leaf=lambda x: isinstance(x, _NODES))
            at = [place for place, leaf in enumerate(leaves) if isinstance(leaf, _NODES)]
            nodes, changed = [leaves[place] for place in at], []
            others = [None if isinstance(leaf, _NODES) else leaf for leaf in leaves]

            def use(nodes: list, others: list):
                given = [
                    leaf if place not in at else nodes[at.index(place)]
                    for place, leaf in enumerate(others)
                ]
                args, named = jax.tree.unflatten(tree, given)
                return method(*args, **named)

            def pure(values: list, others: list):
                result, after = _pure(nodes, use)(values, others)
                changed[:] = _replaced(values, after)
                return result, [after[place] for place in changed]

            state = _flat_state(nodes)
            result, after = checkpointed(pure, bound, given, prevent_cse)(_values(state), others)
            if changed:
                nn.update(nodes, _with_values(state, dict(zip(changed, after, strict=True))))
            return result

        return call

    return replaced(block, methods, wrap, bound, given, "nnx.remat_of")


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
      same variable. And for each kind, the places of those that belong to one layer.

    Raises:
      ValueError: Some layers of a kind share a variable that changes, and others do not.
    """
    ids = []
    for whole, state in zip(wholes, states, strict=True):
        nodes = {path: node for path, node in nn.iter_graph(whole) if _is_variable(node)}
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
            if is_one(of_kind[place]):
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
                    f"some of the layers share {'.'.join(map(str, path[1:]))}, which changes when "
                    "they are called; it may belong to one layer, or to all of a kind"
                )
    return shared, own


def _flat_state(whole: list | nn.Module) -> list[tuple]:
    """Returns the paths and variables of a module, or of a list of modules."""
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
            "called, which checkpointing does not keep; return it beside the carry (out=0 has it "
            "stacked), or make an nnx.Variable for it before"
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
