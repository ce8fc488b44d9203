"""A block traced once: a closed function of flat leaves, its jaxpr, its abstract arguments.

    block, consts = trace_block(block, carry, params_i, consts)
    block.call(carry_leaves, params_leaves, consts)

Arrays that the block closed over become consts. So they get gradients, and the function holds no
tracer of the caller. `abstract` turns any array into its type, with weak types, keys, shardings and
varying axes.
"""

import dataclasses
import functools
import itertools
import re
import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray, Tracer
from jax.extend import core
from jax.sharding import PartitionSpec


def abstract(tree):
    """Returns `tree` with every array, abstract array or scalar as its type."""
    return jax.tree.map(lambda x: x if isinstance(x, ShapedArray) else jax.typeof(x), tree)


def as_arrays(tree):
    """Returns `tree` with Python scalars and NumPy arrays as JAX arrays; weak types stay weak."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), tree)


def zeros(count: int, aval: ShapedArray) -> jax.Array:
    """Returns zeros `[count, ...]` with a type's memory, sharding and varying axes.

    For zeros on the host, only a single number is moved to the host and broadcast there: zeros that
    are made on the device first would need its memory.
    """
    spec, varying = aval.sharding.spec, varying_axes(aval)
    is_sharded = any(axis is not None for axis in spec)
    sharding = aval.sharding.update(spec=PartitionSpec(None, *spec)) if is_sharded else None
    number = lax.full((), 0, aval.dtype)
    number = vary(number, varying) if varying else number
    if aval.memory_space != jax.memory.Space.Device:
        # The barrier hides the constant: XLA would place an array made of it where it likes.
        number = jax.device_put(lax.optimization_barrier(number), aval.memory_space)
    return lax.broadcast(number, (count, *aval.shape), out_sharding=sharding)


def vary(x, axes: tuple[str, ...]):
    """Returns an array typed as varying along some mesh axes, along which it is equal so far."""
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axes, to="varying")
    return lax.pvary(x, axes)  # jax 0.7  # pyright: ignore[reportAttributeAccessIssue]


def varying_axes(aval: ShapedArray) -> tuple[str, ...]:
    """Returns the axes of `jax.shard_map` along which a value varies."""
    kind = getattr(aval, "mat", None)  # its name since jax 0.10
    return tuple(getattr(aval, "vma", ()) if kind is None else kind.varying)


def first_block(params):
    """Returns the abstract parameters of one block: every leaf without its leading axis."""
    leaves, tree = jax.tree.flatten(abstract(params))
    first = jax.make_jaxpr(lambda leaves: [x[0] for x in leaves])(leaves)
    return jax.tree.unflatten(tree, first.out_avals)


def all_blocks(params_i, num_blocks: int):
    """Returns the abstract parameters of a stack, from those of one block."""
    leaves, tree = jax.tree.flatten(abstract(params_i))
    stacked = jax.make_jaxpr(lambda leaves: [lax.broadcast(x, (num_blocks,)) for x in leaves])
    return jax.tree.unflatten(tree, stacked(leaves).out_avals)


def on_devices(x, sharding) -> jax.ShapeDtypeStruct:
    """Returns the type of `x` with a sharding, which names devices; a type alone names none."""
    aval = abstract(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding, weak_type=aval.weak_type)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TracedBlock:
    """A block that closes over nothing; two blocks are equal if their jaxprs are.

    Attributes:
      jaxpr: From the leaves of carry, parameters and consts to the leaves of the output.
      counts: How many leaves the carry, the parameters and the consts have.
      out_tree: The structure of the block's output.
    """

    jaxpr: core.ClosedJaxpr
    counts: tuple[int, int, int]
    out_tree: Any

    @property
    def out(self):
        """The block's output, abstract."""
        return jax.tree.unflatten(self.out_tree, self.jaxpr.out_avals)

    @property
    def inputs(self) -> tuple[list, list, list]:
        """The abstract leaves of the carry, the parameters and the consts."""
        avals, (carry, params, _) = self.jaxpr.in_avals, self.counts
        return avals[:carry], avals[carry : carry + params], avals[carry + params :]

    @property
    def changed(self) -> tuple[int, ...]:
        """The positions of the carry's leaves that the block does not return unchanged."""
        pairs = zip(self.jaxpr.jaxpr.invars, self.jaxpr.jaxpr.outvars, strict=False)
        carry = itertools.islice(pairs, self.counts[0])
        return tuple(place for place, (given, made) in enumerate(carry) if given is not made)

    @property
    def ys(self) -> list:
        """The abstract leaves of the ys, which follow the carry in the block's output."""
        return self.jaxpr.out_avals[self.counts[0] :]

    def call(self, carry: Sequence, params_i: Sequence, consts: Sequence) -> list:
        """Returns the leaves of the block's output: the carry's, then the `ys`."""
        return core.jaxpr_as_fun(self.jaxpr)(*carry, *params_i, *consts)

    def only_changed(self, places: Sequence[int] | None = None) -> "TracedBlock":
        """Returns the block with the carry's unchanged leaves as consts, after the other consts.

        A schedule then keeps these leaves once and not with every carry.

        Args:
          places: The leaves that stay in the carry; by default those that this block changes.
        """
        places, jaxpr = self.changed if places is None else places, self.jaxpr.jaxpr
        carry, rest = jaxpr.invars[: self.counts[0]], jaxpr.invars[self.counts[0] :]
        held = [var for place, var in enumerate(carry) if place not in places]
        ys = jaxpr.outvars[self.counts[0] :]
        jaxpr = jaxpr.replace(
            invars=[*(carry[place] for place in places), *rest, *held],
            outvars=[*(jaxpr.outvars[place] for place in places), *ys],
            # The old names belong to the old arguments and results.
            debug_info=jaxpr.debug_info.with_unknown_names(),
        )
        return TracedBlock(
            jaxpr=core.ClosedJaxpr(jaxpr, ()),
            counts=(len(places), self.counts[1], self.counts[2] + len(held)),
            out_tree=jax.tree.structure([0] * (len(places) + len(ys))),
        )

    @functools.cached_property
    def _key(self) -> tuple:
        return text_of(self.jaxpr), tuple(self.jaxpr.in_avals), self.counts, self.out_tree

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other) -> bool:
        return isinstance(other, TracedBlock) and self._key == other._key


def text_of(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> str:
    """Returns a jaxpr's text; jaxprs of equal text compute the same from inputs and consts."""
    return without_addresses(str(jaxpr))


def without_addresses(text: str) -> str:
    """Returns a text without the addresses of objects, which differ in each trace."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def identity(block: Callable) -> Hashable:
    """Returns a key under which a block's compiled program is kept; equal for equal blocks only.

    The key does not keep a function alive; the key of a dead function equals no other.
    """
    if isinstance(block, types.MethodType):
        return weakref.WeakMethod(block)
    if isinstance(block, types.FunctionType):
        return weakref.ref(block)
    try:
        hash(block)
    except TypeError:
        return object()
    return block


def once_compiled(run: Callable, identities: Hashable, *static: Hashable) -> Callable:
    """Returns `run` with its static arguments bound, to be called at once.

    Outside `jit`, every call would compile its loops again, because their functions are new. So the
    compiled program is kept for the next call with equal identities and `static`. Inside `jit`, the
    function is returned as it is.

    Args:
      run: A function of this package.
      identities: What `identity` returns for the blocks.
      *static: The first arguments of `run`; with the blocks they define the program.
    """
    if isinstance(jnp.zeros([]), Tracer):
        return functools.partial(run, *static)
    return _jitted(run, identities, static)


@functools.lru_cache(maxsize=64)
def _jitted(run: Callable, identities: Hashable, static: tuple) -> Callable:
    return jax.jit(functools.partial(run, *static))


def trace_block(block: Callable, carry, params_i=(), consts=()) -> tuple[TracedBlock, list]:
    """Returns `block(carry, params_i, *consts)` traced, and its consts.

    Args:
      block: The block.
      carry: The block's input, arrays or abstract.
      params_i: One block's parameters, abstract.
      consts: A tuple of arrays.

    Returns:
      The block, and the leaves of its consts: the caller's, then arrays that it closed over.
    """
    trees = [jax.tree.structure(part) for part in (carry, params_i, consts)]
    leaves = [jax.tree.leaves(part) for part in (carry, params_i, consts)]
    out_trees = []

    def flat(*leaves):
        carry, params_i, consts = map(jax.tree.unflatten, trees, leaves)
        made, tree = jax.tree.flatten(block(carry, params_i, *consts))
        out_trees.append(tree)
        return made

    closed = jax.make_jaxpr(flat)(*map(abstract, leaves))
    # What was closed over comes last among the arguments.
    jaxpr = closed.jaxpr.replace(
        constvars=[],
        invars=[*closed.jaxpr.invars, *closed.jaxpr.constvars],
        debug_info=closed.jaxpr.debug_info.with_unknown_names(),
    )
    all_consts = [*leaves[2], *closed.consts]
    traced = TracedBlock(
        jaxpr=core.ClosedJaxpr(jaxpr, ()),
        counts=(len(leaves[0]), len(leaves[1]), len(all_consts)),
        out_tree=out_trees[-1],
    )
    return traced, all_consts
