"""`Stack`: L equal NNX blocks under a plan, their variables stacked in one block.

    self.layers = jaxckpt.nnx.Stack(Block, 28, remat="sqrt", rngs=rngs)
    x = self.layers(x, mask, deterministic=True)

A `Stack` is an NNX module like any other (`nnx.jit`, `nnx.grad`, `nnx.Optimizer`, `nnx.state`,
`eval()`), and its state does not depend on the plan. Blocks that change variables beside their
random streams are refused, unless `carry=` names the variables' class, such as `nnx.BatchStat`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import spmd
from jax.core import Tracer

from jaxckpt.nnx.state import dotted, flat_state, is_variable, with_values
from jaxckpt.plans import Plan, PlanError
from jaxckpt.plans.errors import shown
from jaxckpt.transforms.arguments import apart, check_class, part, put
from jaxckpt.transforms.checks import check_carry
from jaxckpt.transforms.policies import plan_and_policy
from jaxckpt.transforms.scan import scan
from jaxckpt.transforms.traced_block import first_block

# The name of the stacked axis in partition specs; None, because the axis is not sharded.
_AXIS = {nnx.PARTITION_NAME: None}


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


class Stack(nnx.Module):
    """L equal NNX blocks under a plan; their variables are stacked `[L, ...]` in `blocks`.

    Row `i` of `stack.blocks.mlp.kernel` is the kernel of block `i`. Every block has its own random
    streams, and draws the same numbers as in a loop. A recomputed block draws the same numbers
    again; the next call draws new numbers. `remat` and `unroll` may be assigned at any time.

    Attributes:
      blocks: One block whose variables and arrays hold all blocks, stacked.
      num_blocks: The number of blocks, L.
      remat: A plan or its text, or a policy of `jax.checkpoint`.
      unroll: Blocks unrolled in one trip of a loop.
      out: The place of the carry in a block's result: an index, a key, or a function; None if the
        result is the carry.
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
        block: Callable[..., nnx.Module],
        num_blocks: int,
        *,
        remat: str | Plan | Callable = "full",
        unroll: int = 1,
        out: int | str | Callable | None = None,
        carry: type[nnx.Variable] | Sequence[type[nnx.Variable]] = (),
        rngs: nnx.Rngs,
    ):
        """Makes the blocks.

        Args:
          block: An NNX module class, or a `functools.partial` of one; `rngs=` is its only argument.
          num_blocks: The number of blocks, L.
          remat: A plan or its text, or a policy of `jax.checkpoint`.
          unroll: Blocks unrolled in one trip of a loop.
          out: The place of the carry in a block's result: an index, a key, or a function. The rest
            of a tuple or dict is returned stacked, `[L, ...]`. None if the result is the carry.
          carry: One or several classes of variables that a block may change, such as
            `nnx.BatchStat`. A block changes its variables once per call, also if it is recomputed.
          rngs: The random streams; each is split into one key per block.

        Raises:
          PlanError: The plan does not parse or does not fit L blocks.
          ValueError: Blocks would share a variable, or `carry` is no class of variables.
        """
        check_class(block, nnx.Module, "nnx.Stack", takes_functions=True)
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
            if not (isinstance(kind, type) and issubclass(kind, nnx.Variable)):
                raise ValueError(
                    f"carry is a class of nnx.Variable, such as nnx.BatchStat, not {shown(kind)}"
                )
        self.blocks = _make_blocks(block, _split(rngs, num_blocks), num_blocks)

    def __call__(self, carry, *consts, **named):
        """Runs the blocks one after another.

        Args:
          carry: The first block's input, any pytree of arrays; `block(carry, *consts, **named)`
            returns a carry with this structure, these shapes and these dtypes.
          *consts: Arguments of every block. Arrays get gradients; Python values, such as `True`,
            stay Python values.
          **named: Keyword arguments for every block, such as `deterministic=True`. The streams of
            `rngs=nnx.Rngs(...)` are split, so that each block gets its own.

        Returns:
          The last block's carry; with `out`, the result of a block with its rest stacked.

        Raises:
          PlanError: The plan does not parse, does not fit L blocks, or names what no block has.
          ValueError: A block changes the type of its carry, or changes variables that are no random
            streams and that `self.carry` does not name; or `unroll` is no positive whole number.
        """
        graph, counts, rest = nnx.split(self.blocks, nnx.RngCount, ...)
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
            nnx.update(self.blocks, jax.tree.unflatten(tree, leaves))
        if changed:
            state = flat_state(self.blocks)
            places = [place for place, (path, _) in enumerate(state) if dotted(path) in changed]
            values = {place: changed[dotted(state[place][0])] for place in places}
            nnx.update(self.blocks, with_values(state, values))
        return put(carry, rest, self.out)


def _split_keys(consts, named: dict, num_blocks: int) -> tuple[dict[str, jax.Array], dict]:
    """Returns one key per block from every stream of the call's `rngs`, and the other keywords."""
    named = dict(named)
    rngs = named.pop("rngs", None)
    if any(isinstance(value, nnx.Rngs | nnx.RngStream) for value in (*consts, *named.values())):
        raise ValueError(
            "random streams are given to a stack as rngs=nnx.Rngs(...); otherwise every block "
            "would draw the same numbers"
        )
    return ({} if rngs is None else _split(rngs, num_blocks)), named


def _split(rngs: nnx.Rngs, num_blocks: int) -> dict[str, jax.Array]:
    """Returns one key per block from every stream."""
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(
            f"rngs is an nnx.Rngs, whose streams are split over the blocks, not {rngs!r}"
        )
    return {name: jax.random.split(stream(), num_blocks) for name, stream in rngs.items()}


def _make_blocks(
    block: Callable[..., nnx.Module], keys: dict[str, jax.Array], num_blocks: int
) -> nnx.Module:
    """Returns a block whose state is stacked from one block for each row of `keys`."""
    graphs = []
    jax.eval_shape(
        functools.partial(_check_unshared, block), {n: key[0] for n, key in keys.items()}
    )

    def make_one(keys):
        made = block(rngs=nnx.Rngs(**keys))
        graph, state = nnx.split(made)
        _check_arrays(made, state)
        graphs.append(graph)
        return state

    state = jax.vmap(make_one, axis_size=num_blocks)(keys)
    return nnx.merge(graphs[0], _with_axis(state))


def _with_axis(state):
    """Returns the blocks' state with the stacked axis added to its partition specs."""
    add = lambda x: _marked(spmd.add_axis(x, 0, _AXIS), True) if is_variable(x) else x
    return jax.tree.map(add, state, is_leaf=is_variable)


def _without_axis(state):
    """Returns one block's state with the stacked axis removed from its partition specs."""
    has_axis = lambda x: is_variable(x) and x.get_metadata().get(_STACKED)
    remove = lambda x: _marked(spmd.remove_axis(x, 0, _AXIS), False) if has_axis(x) else x
    return jax.tree.map(remove, state, is_leaf=is_variable)


def _marked(variable: nnx.Variable, stacked: bool) -> nnx.Variable:
    if hasattr(variable, "set_metadata"):
        variable.set_metadata(_STACKED, stacked)
    else:  # Flax 0.11
        setattr(variable, _STACKED, stacked)
    return variable


def _run_block(graph, merge: Callable, out, kept: Sequence[type], carry, row, arrays):
    """Returns one block's carry, the rest of its result, its draws, and the variables it changed.

    Draws are a number for each stream, None for a stream that the block did not draw from. The
    changed variables are lists of leaves by path.

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
    block = nnx.merge(graph, *_without_axis(state))
    consts, named = merge(arrays)
    if row["keys"]:
        named = {**named, "rngs": nnx.Rngs(**row["keys"])}
    graph, _, before = nnx.split(block, nnx.RngCount, ...)
    before = _arrays(before)
    carry, rest = part(block(carry, *consts, **named), out)
    graph_after, counts, after = nnx.split(block, nnx.RngCount, ...)
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
    return {dotted(path): jax.tree.leaves(variable) for path, variable in nnx.to_flat_state(state)}


def _kept(before: dict, after, same_graph: bool, kept: Sequence[type]) -> dict[str, list]:
    """Returns the leaves of the variables that a call changed, by path.

    Args:
      before: The arrays of the block's variables, by path.
      after: The block's state after the call.
      same_graph: Whether the block's attributes are unchanged.
      kept: The classes of variables that a block may change.

    Raises:
      ValueError: The call changed other variables, made variables, or changed attributes.
    """
    changed = {
        dotted(path): variable
        for path, variable in nnx.to_flat_state(after)
        if [*map(id, jax.tree.leaves(variable))] != [*map(id, before.get(dotted(path), ()))]
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


def _check_unshared(block: Callable[..., nnx.Module], keys):
    """Raises `ValueError` if blocks would share a variable that was made outside of them."""
    one, other = (block(rngs=nnx.Rngs(**keys)) for _ in range(2))
    seen = {id(node) for _, node in nnx.iter_graph(other)}
    for path, node in nnx.iter_graph(one):
        if id(node) in seen and isinstance(node, nnx.Variable | nnx.Module):
            raise ValueError(
                f"the block's {dotted(path)} is made outside of the block, and the "
                "blocks of a stack would not share it; call it outside and pass its output to the "
                "stack, or make it in the block"
            )


def _check_arrays(block: nnx.Module, state):
    """Raises `ValueError` if Flax treats an array of a block as a static attribute."""
    kept = {id(leaf) for leaf in jax.tree.leaves(state)}
    for path, node in nnx.iter_graph(block):
        attributes = vars(node).items() if isinstance(node, nnx.Module) else ()
        for name, value in attributes:
            leaves = [x for x in jax.tree.leaves(value) if isinstance(x, Tracer)]
            if any(id(leaf) not in kept for leaf in leaves):
                where = dotted((*path, name))
                raise ValueError(
                    f"Flax takes the array {where} of the block for a static attribute, which "
                    f"differs from block to block here; write self.{name} = nnx.data(array)"
                )
