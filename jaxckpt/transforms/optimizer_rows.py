"""An optimizer, split into the update of one block and the update of all other parameters.

An optimizer is any object with Optax's `init(params)` and `update(gradients, state, params)`. Its
`init` is traced for two lengths of the stack: an array of the state belongs to blocks if its first
axis follows the length. No optimizer is known by its name.

The optimizer gets a block as a stack of length 1: every leaf is `[1, ...]`. Masks and rules about
axes then decide as they do for the whole stack. Parameters that are left out are None.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_NOT_BLOCKWISE = (
    "update_in_backward needs an optimizer whose update of a block depends on that block only"
)


def apply_updates(params, updates):
    """Returns the parameters with updates added, as `optax.apply_updates` does."""
    return jax.tree.map(lambda p, u: jnp.asarray(p + u).astype(p.dtype), params, updates)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerRows:
    """An optimizer, cut into the update of a block and the update of the rest.

    Attributes:
      optimizer: The optimizer.
      tree: The structure of the parameters.
      state_tree: The structure of the state of all parameters; places of state leaves count in it.
      stacked: The places of the stack's leaves among the leaves of the parameters.
      rows: The places of the state leaves that have one row for each block.
      of_stack: For each leaf of the state of the stack alone, its place.
      of_rest: For each leaf of the state of the other parameters, its place.
      stack_tree: The structure of the state of the stack alone.
      rest_tree: The structure of the state of the other parameters.
    """

    optimizer: Any
    tree: Any
    state_tree: Any
    stacked: tuple[int, ...]
    rows: tuple[int, ...]
    of_stack: tuple[int, ...]
    of_rest: tuple[int, ...]
    stack_tree: Any
    rest_tree: Any

    @classmethod
    def of(cls, optimizer, params, stacked: Sequence[int]) -> "OptimizerRows":
        """Returns the cut optimizer.

        Args:
          optimizer: An optimizer with Optax's `init` and `update`.
          params: The parameters, arrays or abstract.
          stacked: The places of the stack's leaves among the leaves of `params`.

        Raises:
          ValueError: The optimizer's state of a block is not a row of its state of the stack.
        """
        leaves, tree = jax.tree.flatten(params)
        count = leaves[stacked[0]].shape[0]

        def state_of(length: int | None, *, with_rest: bool):
            """Returns paths and types of the state for a stack of a length; None leaves it out."""

            def one(place, leaf):
                shape, chosen = leaf.shape, with_rest
                if place in stacked:
                    shape, chosen = (length, *leaf.shape[1:]), length is not None
                return jax.ShapeDtypeStruct(shape, leaf.dtype) if chosen else None

            made = jax.tree.unflatten(tree, [one(n, leaf) for n, leaf in enumerate(leaves)])
            found, of = jax.tree_util.tree_flatten_with_path(jax.eval_shape(optimizer.init, made))
            return {jax.tree_util.keystr(path): leaf for path, leaf in found}, of

        whole, state_tree = state_of(count, with_rest=True)
        longer, longer_tree = state_of(count + 1, with_rest=True)
        block, stack_tree = state_of(1, with_rest=False)
        rest, rest_tree = state_of(None, with_rest=True)
        if longer_tree != state_tree or not set(block) | set(rest) == set(whole):
            raise ValueError(
                f"{_NOT_BLOCKWISE}; the structure of this one's state depends on other blocks"
            )
        rows = [path for path, leaf in whole.items() if leaf.shape != longer[path].shape]
        for path, leaf in block.items():
            wanted = whole[path].shape
            if path in rows:
                wanted = (1, *wanted[1:])
                grown = (count + 1, *whole[path].shape[1:]) == longer[path].shape
                if path in rest or not grown:
                    wanted = None
            elif path not in rest and leaf.size > 1:
                wanted = None
            if leaf.shape != wanted:
                raise ValueError(
                    f"{_NOT_BLOCKWISE}; its state{path} is {whole[path].shape} for {count} blocks "
                    f"and {leaf.shape} for one block; valid: one row for each block"
                )
            if path in rows and not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise ValueError(
                    f"update_in_backward takes floating state for blocks; state{path} is "
                    f"{leaf.dtype}"
                )
        place = {path: number for number, path in enumerate(whole)}
        return cls(
            optimizer=optimizer,
            tree=tree,
            state_tree=state_tree,
            stacked=tuple(stacked),
            rows=tuple(place[path] for path in rows),
            of_stack=tuple(place[path] for path in block),
            of_rest=tuple(place[path] for path in rest),
            stack_tree=stack_tree,
            rest_tree=rest_tree,
        )

    def update_block(self, grads: list, params: list, rows: list, state: list):
        """Returns new parameters and new rows of the state of one block.

        Args:
          grads: The block's gradients, leaves `[1, ...]`.
          params: The block's parameters, leaves `[1, ...]`.
          rows: The block's rows of the state, leaves `[1, ...]`.
          state: All leaves of the state; leaves with rows for blocks are not read.
        """
        of_row = dict(zip(self.rows, rows, strict=True))
        given = [of_row.get(place, state[place]) for place in self.of_stack]
        given = jax.tree.unflatten(self.stack_tree, given)
        of_params = self._some(dict(zip(self.stacked, params, strict=True)))
        of_grads = self._some(dict(zip(self.stacked, grads, strict=True)))
        updates, made = self.optimizer.update(of_grads, given, of_params)
        made = dict(zip(self.of_stack, jax.tree.leaves(made), strict=True))
        return jax.tree.leaves(apply_updates(of_params, updates)), [made[n] for n in self.rows]

    def update_rest(self, grads: dict, params: dict, state: list) -> tuple[list, dict]:
        """Returns the new parameters outside the stack, and new leaves of the state by place."""
        given = jax.tree.unflatten(self.rest_tree, [state[place] for place in self.of_rest])
        of_params = self._some(params)
        updates, made = self.optimizer.update(self._some(grads), given, of_params)
        made = dict(zip(self.of_rest, jax.tree.leaves(made), strict=True))
        # Placeholders of the stack, such as those of moments that are not factored, never change.
        kept = set(self.of_stack) - set(self.of_rest) - set(self.rows)
        made |= {place: state[place] for place in kept}
        return jax.tree.leaves(apply_updates(of_params, updates)), made

    def _some(self, leaves: dict):
        """Returns the tree of parameters, with None for each leaf that is not given."""
        count = self.tree.num_leaves
        return jax.tree.unflatten(self.tree, [leaves.get(n) for n in range(count)])


def check_blockwise(optimizer, params, stacked: Sequence[int]):
    """Raises unless the update of a block depends on that block alone; found by values.

    The optimizer is run on small arrays: on everything at once, and block by block.

    Args:
      optimizer: An optimizer with Optax's `init` and `update`.
      params: The parameters, arrays or abstract.
      stacked: The places of the stack's leaves among the leaves of `params`.

    Raises:
      ValueError: The update of a block depends on other blocks or other parameters.
    """
    leaves, tree = jax.tree.flatten(params)
    generator = np.random.default_rng(0)

    def small(place, leaf):
        shape = [min(size, 3) for size in leaf.shape]
        if place in stacked:
            shape[0] = 2
        return generator.normal(size=shape).astype(np.float32)

    values, *grads = ([small(place, leaf) for place, leaf in enumerate(leaves)] for _ in range(3))
    cut = OptimizerRows.of(optimizer, jax.tree.unflatten(tree, values), stacked)
    spoilt = [np.full_like(g, np.nan) if n == stacked[0] else g for n, g in enumerate(grads[0])]
    spoilt[stacked[0]][0] = 1.0  # only block 1 has a gradient that is not finite
    # Large gradients, for updates such as clipping that only change large gradients.
    large = [[g * np.float32(1e12) for g in one] for one in grads]
    for both in (grads, large, [spoilt]):
        with jax.ensure_compile_time_eval():
            what = jax.device_get(jax.jit(functools.partial(_differences, cut, values))(both))
        if what["block"]:
            culprit = (
                "gradients of other parameters, as clipping by the global norm does; hand "
                "gradient_scale= over instead"
                if what["stack"]
                else "other blocks of the same parameter, as clip_by_block_rms and Adafactor's "
                "scale by a parameter's size do"
            )
            raise ValueError(f"{_NOT_BLOCKWISE}; the update of this one depends on {culprit}")


def _differences(cut: OptimizerRows, values: list, grads: Sequence[list]) -> dict:
    """Returns whether updates by block, and updates of the stack alone, differ from the whole's."""
    unflatten = lambda leaves: jax.tree.unflatten(cut.tree, leaves)
    state = cut.optimizer.init(unflatten(values))
    whole = _stepped(cut, values, state, grads)
    pick = lambda leaves: [leaves[place] for place in cut.stacked]

    def some(make: Callable) -> list:
        leaves, at = jax.tree.leaves(state), values
        for one in grads:
            at, leaves = make(at, leaves, one)
        return [*pick(at), *(leaves[n] for n in cut.rows)]

    def by_block(values, state, grads):
        made = []
        for i in range(2):
            row = lambda leaves, i=i: [leaf[i : i + 1] for leaf in leaves]
            rows = row([state[n] for n in cut.rows])
            made.append(cut.update_block(row(pick(grads)), row(pick(values)), rows, state))
        return after(values, state, grads, *jax.tree.map(lambda *x: jnp.concatenate(x), *made))

    def by_stack(values, state, grads):
        rows = [state[n] for n in cut.rows]
        return after(
            values, state, grads, *cut.update_block(pick(grads), pick(values), rows, state)
        )

    def after(values, state, grads, new, rows):
        rest = [n for n in range(len(values)) if n not in cut.stacked]
        of = lambda leaves: {n: leaves[n] for n in rest}
        others, shared = cut.update_rest(of(grads), of(values), state)
        new = dict(zip(cut.stacked, new, strict=True)) | dict(zip(rest, others, strict=True))
        shared |= dict(zip(cut.rows, rows, strict=True))
        return [new[n] for n in range(len(values))], [shared[n] for n in range(len(state))]

    wanted = [*pick(whole[0]), *(whole[1][n] for n in cut.rows)]
    differ = lambda found: jnp.stack([_differs(*x) for x in zip(found, wanted, strict=True)]).any()
    return {"block": differ(some(by_block)), "stack": differ(some(by_stack))}


def _stepped(cut: OptimizerRows, values: list, state, grads: Sequence[list]):
    """Returns leaves of parameters and state after the optimizer's own steps."""
    params = jax.tree.unflatten(cut.tree, values)
    for one in grads:
        updates, state = cut.optimizer.update(jax.tree.unflatten(cut.tree, one), state, params)
        params = apply_updates(params, updates)
    return jax.tree.leaves(params), jax.tree.leaves(state)


def _differs(found, wanted):
    """Returns whether two arrays differ by more than rounding; NaN equals NaN."""
    finite = jnp.nan_to_num(wanted, nan=0.0, posinf=0.0, neginf=0.0)
    allowed = 1e-4 * jnp.maximum(jnp.abs(finite).max(initial=0), 1e-30)
    same = (jnp.abs(found - wanted) <= allowed) | (found == wanted)
    return ~jnp.all(same | (jnp.isnan(found) & jnp.isnan(wanted)))
