"""Flax NNX adapter: a module class in, a rematerialized stack out.

    self.layers = jaxckpt.nnx.Stack(Block, 28, remat="sqrt", rngs=rngs)
    x = self.layers(x, mask, deterministic=True)

A `Stack` is an NNX module like any other (`nnx.jit`, `nnx.grad`, `nnx.Optimizer`, `nnx.state`,
`eval()`), and its state does not depend on the plan. A block keeps parameters and random streams
alone; batch statistics, caches and what is sown are refused.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Not as `nnx`: the package's lazy names would find Flax's module under this module's own name.
from flax import nnx as nn
from flax.nnx import spmd
from jax.core import Tracer

from jaxckpt.plans import Plan, PlanError
from jaxckpt.transforms.arguments import apart, check_class, part, put
from jaxckpt.transforms.checks import check_carry
from jaxckpt.transforms.policies import plan_and_policy
from jaxckpt.transforms.scan import scan
from jaxckpt.transforms.traced_block import first_block

# The stacked axis in partition specs: not sharded.
_AXIS = {nn.PARTITION_NAME: None}
# Metadata of the variables whose partition spec has that axis. Values that come with the metadata
# of other blocks, as `nnx.update` brings them, have no such axis in their spec.
_STACKED = "jaxckpt_stacked"

# What to do about a kind of state, by the name of its class.
_CURES = {
    "BatchStat": "use a layer without state (LayerNorm or GroupNorm instead of BatchNorm)",
    "Cache": "decode with a loop over blocks, which needs no gradients and so no checkpointing",
    "Intermediate": "return what is sown beside the carry (out=0 has it stacked)",
}
_CURE = "put it into the carry, make it an nnx.Param if it is learned, or a plain array if fixed"


class Stack(nn.Module):
    """L equal NNX blocks under a plan; their variables are stacked `[L, ...]` in `blocks`.

    Block `i` of `stack.blocks.mlp.kernel` is its row `i`. Every block has random streams of its
    own and draws what it would draw in a loop: recomputation repeats it, the next call does not.
    `remat` and `unroll` may be assigned at any time.

    Attributes:
      blocks: One block whose variables and arrays are those of all blocks, stacked.
      num_blocks: L.
      remat: A plan or its text, or a policy of `jax.checkpoint`.
      unroll: Blocks unrolled in one trip of a loop.
      out: Where the carry is in what a block returns.

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
          num_blocks: L.
          remat: A plan or its text, or a policy of `jax.checkpoint`.
          unroll: Blocks unrolled in one trip of a loop.
          out: Where the carry is in what a block returns: an index, a key, or a function. The rest
            of a tuple or dict comes back stacked, `[L, ...]`. None for a block that returns its
            carry alone.
          rngs: Every stream is split into one key a block.

        Raises:
          PlanError: A plan that does not parse or does not fit L blocks.
          ValueError: A block with state beside parameters and random streams.
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
        """Returns the last block's carry; with `out`, what a block returns, its rest stacked.

        Args:
          carry: The first block's input; `block(carry, *consts, **named)` returns its like.
          *consts: Handed to every block. Arrays get gradients; Python values, such as `True`, stay
            what they are.
          **named: The same by keyword, such as `deterministic=True`. Of `rngs=nnx.Rngs(...)` each
            block is handed streams of its own, split from these.

        Raises:
          PlanError: As `jaxckpt.scan_blocks`.
          ValueError: As `jaxckpt.scan_blocks`, or a block that keeps or changes other state.
        """
        _check_state(self.blocks)
        graph, counts, rest = nn.split(self.blocks, nn.RngCount, ...)
        # The index is there for blocks that have neither parameters nor keys.
        rows = {"counts": counts, "rest": rest, "index": jnp.arange(self.num_blocks)}
        rows["keys"], named = _split_keys(consts, named, self.num_blocks)
        arrays, merge = apart((consts, named))
        run = functools.partial(_run_block, graph, merge, self.out)
        drawn = _drawn_streams(run, carry, rows, arrays)

        def apply(carry, row):
            carry, rest, draws = run(carry, row, arrays)
            return carry, (rest, {i: draws[i] for i in drawn})

        carry, (rest, draws) = scan(apply, carry, rows, remat=self.remat, unroll=self.unroll)
        if drawn:  # a call that changes nothing can be made anywhere
            leaves, tree = jax.tree.flatten(counts)
            most = {i: number.max() for i, number in draws.items()}
            leaves = [leaf + most.get(i, 0) for i, leaf in enumerate(leaves)]
            nn.update(self.blocks, jax.tree.unflatten(tree, leaves))
        return put(carry, rest, self.out)


def _split_keys(consts, named: dict, num_blocks: int) -> tuple[dict[str, jax.Array], dict]:
    """Returns one key a block from every stream of the call's `rngs`, and its other values."""
    named = dict(named)
    rngs = named.pop("rngs", None)
    if any(isinstance(value, nn.Rngs | nn.RngStream) for value in (*consts, *named.values())):
        raise ValueError(
            "random streams are handed to a stack as rngs=nnx.Rngs(...), or every block would "
            "draw the same"
        )
    return ({} if rngs is None else _split(rngs, num_blocks)), named


def _split(rngs: nn.Rngs, num_blocks: int) -> dict[str, jax.Array]:
    """Returns one key a block from every stream."""
    if not isinstance(rngs, nn.Rngs):
        raise ValueError(
            f"rngs is an nnx.Rngs, whose streams are split over the blocks, not {rngs!r}"
        )
    return {name: jax.random.split(stream(), num_blocks) for name, stream in rngs.items()}


def _make_blocks(
    block: Callable[..., nn.Module], keys: dict[str, jax.Array], num_blocks: int
) -> nn.Module:
    """Returns a block whose state is stacked: one block for each row of `keys`."""
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
    """Returns the blocks' state, its partition specs with the stacked axis."""
    add = lambda x: _marked(spmd.add_axis(x, 0, _AXIS), True) if _is_variable(x) else x
    return jax.tree.map(add, state, is_leaf=_is_variable)


def _without_axis(state):
    """Returns one block's state, its partition specs without the stacked axis."""
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
    """Returns one block's carry, the rest of its result, and how often each of its streams drew.

    The last is None for a stream that nobody drew from.

    Args:
      graph: The stacked blocks' graph definition.
      merge: From the call's arrays to all its arguments, as of `apart`.
      out: Where the carry is in the block's result.
      carry: The block's input.
      row: The block's state, keys and index.
      arrays: The call's.
    """
    # Flax changes the variables it is given in place, so they are copied.
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
    # A count that nobody drew from is still the same object.
    return carry, rest, [None if new is old else new - old for old, new in pairs]


def _drawn_streams(run: Callable, carry, rows, arrays) -> list[int]:
    """Returns the positions of the streams a block draws from; its carry is checked on the way."""
    drawn = []

    def call(carry, row, *arrays):
        carry, _, draws = run(carry, row, arrays)
        drawn[:] = [i for i, count in enumerate(draws) if count is not None]
        return carry

    check_carry(carry, jax.eval_shape(call, carry, first_block(rows), *arrays))
    return drawn


def _arrays(state) -> dict[str, list[jax.Array]]:
    """Returns which arrays are where in a state."""
    return {
        ".".join(map(str, path)): jax.tree.leaves(variable)
        for path, variable in nn.to_flat_state(state)
    }


def _check_unchanged(before: dict, after: dict, same_graph: bool):
    """Raises `ValueError` if a call put other arrays, or other attributes, into its block."""
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
    """Raises `ValueError` if two blocks would hold one variable that was made outside of them."""
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
    """Raises `ValueError` if Flax takes an array of a block for a static attribute."""
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
        if jax.tree.leaves(variable)  # `nnx.capture` gives every module an empty one
    }
    if not found:
        return
    kinds = sorted(set(found.values()))
    cures = dict.fromkeys(_CURES.get(kind, _CURE) for kind in kinds)
    raise ValueError(
        f"the block keeps state in {', '.join(found)} ({', '.join(kinds)}), which a stack of "
        f"checkpointed blocks does not carry; {'; '.join(cures)}"
    )
