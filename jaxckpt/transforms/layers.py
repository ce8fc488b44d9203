"""`run`: an unchanged list of layers under any plan.

    x = jaxckpt.run(model.layers, lambda layer, x, mask: layer(x, mask), x, mask, remat="sqrt")

This is for a model whose list of layers, checkpoints and optimizer state must stay unchanged. Equal
layers are stacked inside the step and run by one loop, and their gradients come back in a list. The
stack is a copy of the layers' parameters, and its gradients are a second copy. Parameters that are
stacked already (`scan_blocks`) need no copies.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt.plans import Plan
from jaxckpt.plans.errors import check_count, shown
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms.arguments import apart, part, put
from jaxckpt.transforms.chain import chain
from jaxckpt.transforms.checks import check_consts, stack_length
from jaxckpt.transforms.mixed import run_mixed
from jaxckpt.transforms.scan import scan


def run(
    layers: Sequence[Any],
    apply: Callable,
    carry,
    *consts,
    each: Mapping[str, Any] | None = None,
    out: int | str | Callable | None = None,
    ignore: str | Sequence[str] = (),
    remat: str | Plan | Schedule | Callable = "sqrt",
    unroll: int = 1,
):
    """Runs a list of layers, checkpointed by a plan that counts the layers.

    Layers of one kind have one structure, equal shapes and equal Python values. A list may hold
    several kinds in any order. Examples are five layers with a sliding window before each layer
    without a window, experts in every other layer, and a special first layer.

    Args:
      layers: Pytrees: Equinox modules, dataclasses of arrays, dicts.
      apply: `apply(layer, carry, *consts, **each_i)`, pure. It returns a carry of the same
        structure, shapes and dtypes, or a result that holds the carry at `out`.
      carry: The first layer's input, any pytree of arrays.
      *consts: Passed to every layer. Arrays get gradients; Python values are passed unchanged.
      each: Keyword arguments that differ from layer to layer: pytrees of `[L, ...]`, such as
        `{"key": jax.random.split(key, L)}`.
      out: The place of the carry in the result of `apply`: an index, a key, or a function. The
        other parts of a tuple or dict come back stacked, `[L, ...]`. None if the result is the
        carry.
      ignore: Names of attributes that may differ within a kind, such as `"layer_idx"`. Every layer
        runs with the value that the first layer of its kind has.
      remat: A plan or its text, a schedule for L blocks, or a policy of `jax.checkpoint`.
      unroll: The number of layers unrolled in one trip of the loop, in whole periods if there are
        several kinds. If it is at least L and `out` is None, there is no loop and no copy of the
        parameters.

    Returns:
      The last layer's carry; with `out`, the result of `apply` with its other parts stacked.

    Raises:
      PlanError: The plan does not parse, does not fit L layers, or names a value that no layer has.
      ValueError: There are no layers, no two of them are equal (the error names the difference),
        `each` has another length, `out` is not in the result, or `apply` changes the carry.
      NotImplementedError: `auto`, or a second derivative through the executor.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, jaxckpt
      >>> layers = [eqx.nn.Linear(8, 8, key=key) for key in jax.random.split(jax.random.key(0), 6)]
      >>> apply = lambda layer, x: jnp.tanh(layer(x))
      >>> loss = lambda layers: jaxckpt.run(layers, apply, jnp.ones(8), remat="full").sum()
      >>> len(eqx.filter_grad(loss)(layers))
      6
    """
    layers, each = check_layers(layers, each, "run takes a list of layers first, then apply and")
    if not callable(apply):
        raise ValueError(f"apply is a function apply(layer, carry, *consts), not {shown(apply)}")
    check_consts(consts)
    order = kinds_of(layers, ignore)

    def step_of(layer) -> Callable:
        _, merge = apart(layer)

        def step(carry, arrays, each_i):
            return part(apply(merge(arrays), carry, *consts, **each_i), out)

        return step

    steps = [step_of(layers[place]) for place in first_places(order)]
    rows = [apart(layer)[0] for layer in layers]
    has_rest = out is not None
    carry, ys = run_rows(
        steps, carry, rows, each, order, has_rest=has_rest, remat=remat, unroll=unroll
    )
    return put(carry, in_order(ys, order), out)


def run_rows(
    steps: Sequence[Callable],
    carry,
    rows: Sequence[Any],
    each: dict[str, Any],
    order: Sequence[int],
    *,
    has_rest: bool,
    remat: str | Plan | Schedule | Callable,
    unroll: int,
) -> tuple[Any, list]:
    """Runs a step for every row; `run` of pytrees, Linen and NNX all call this function.

    Args:
      steps: For each kind of layer, `step(carry, row, each_i) -> (carry, y)`.
      carry: The first step's input.
      rows: A pytree of arrays for each layer, with one structure within a kind. An array that is
        the same object in every row of a kind is not copied.
      each: Keyword arguments that differ from layer to layer, `[L, ...]`.
      order: The kind of each layer.
      has_rest: Whether layers return values beside the carry. If so, there is a loop even if all
        layers are unrolled: without a loop, these values would be kept together with every carry.
      remat: As for `run`.
      unroll: As for `run`.

    Returns:
      The last carry, and for each kind the ys of its layers, stacked.
    """
    check_count("unroll", unroll, " of blocks")
    if unroll >= len(rows) and not has_rest:

        def block(state, i):
            carry, ys = state
            carry, y = steps[order[i]](carry, rows[i], jax.tree.map(lambda x: x[i], each))
            return carry, [*ys, y]

        blocks = [lambda state, i=i: block(state, i) for i in range(len(rows))]
        carry, ys = chain(blocks, (carry, []), remat=remat)
        return carry, [stacked([ys[i] for i in layers]) for layers in _layers_of(order)]
    rows_of = [[rows[i] for i in layers] for layers in _layers_of(order)]
    steps, own = zip(*map(_own, steps, rows_of), strict=True)
    if len(steps) == 1:
        apply = lambda carry, row: steps[0](carry, *row)
        xs = (stacked(own[0]), each)
        carry, ys = scan(apply, carry, xs, len(rows), unroll=unroll, remat=remat)
        return carry, [ys]
    of_kind = list(map(iter, own))
    rows = [next(of_kind[kind]) for kind in order]
    return run_mixed(steps, carry, rows, each, order, remat=remat, unroll=unroll)


def _own(step: Callable, rows: Sequence[Any]) -> tuple[Callable, list[list]]:
    """Returns a step over the arrays that differ between rows, and each row's such arrays.

    Arrays differ unless they are the same object in every row.
    """
    structure = jax.tree.structure(rows[0])
    columns = list(zip(*map(jax.tree.leaves, rows), strict=True))
    own = [i for i, column in enumerate(columns) if any(x is not column[0] for x in column)]

    def apply(carry, row, each_i):
        leaves = [column[0] for column in columns]
        for place, leaf in zip(own, row, strict=True):
            leaves[place] = leaf
        return step(carry, jax.tree.unflatten(structure, leaves), each_i)

    return apply, [[columns[place][i] for place in own] for i in range(len(rows))]


def stacked(trees: Sequence[Any]):
    """Returns one tree from trees of one structure, with stacked leaves."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def first_places(order: Sequence[int]) -> list[int]:
    """Returns the place of the first layer of each kind."""
    return [layers[0] for layers in _layers_of(order)]


def _layers_of(order: Sequence[int]) -> list[list[int]]:
    kinds = range(max(order) + 1)
    return [[i for i, one in enumerate(order) if one == kind] for kind in kinds]


def in_order(ys: Sequence[Any], order: Sequence[int]):
    """Returns the values that layers return beside the carry, `[L, ...]`, in the order of layers.

    Args:
      ys: For each kind, the values of its layers, stacked.
      order: The kind of each layer.

    Raises:
      ValueError: The kinds return values of different structures or shapes.
    """
    if len(ys) == 1:
        return ys[0]
    row = lambda tree: jax.tree.map(lambda x: (x.shape[1:], x.dtype), tree)
    for first, one in zip(first_places(order), ys, strict=True):
        if row(one) != row(ys[0]):
            raise ValueError(
                f"beside the carry layers[0] returns {_types(ys[0])} and layers[{first}] returns "
                f"{_types(one)}; layers of several kinds return values that can be stacked"
            )
    at = np.argsort(np.concatenate(_layers_of(order)))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[at], *ys)


def _types(tree) -> str:
    leaves = [f"{x.dtype}{list(x.shape[1:])}" for x in jax.tree.leaves(tree)]
    return ", ".join(leaves) or "nothing"


def check_layers(layers, each, order: str) -> tuple[list, dict[str, Any]]:
    """Checks the arguments `layers` and `each` of `run`, and returns them as a list and a dict.

    Args:
      layers: The user's list of layers.
      each: The user's keyword arguments that differ from layer to layer; None for no such argument.
      order: The beginning of an error's sentence on the order of arguments.

    Raises:
      ValueError: `layers` is not a list or is empty, or `each` is not a dict or has another length.
    """
    if not hasattr(layers, "__iter__") or isinstance(layers, Mapping | jax.Array | np.ndarray):
        raise ValueError(
            f"{order} the carry; got {shown(layers)} (jaxckpt.scan_blocks takes stacked parameters)"
        )
    layers = list(layers)
    if not layers:
        raise ValueError("layers is an empty list; run needs at least one layer")
    if not isinstance(each, Mapping | None):
        raise ValueError(
            f"each is a dict from a keyword of the layers to [L, ...], not {shown(each)}"
        )
    for name, values in (each or {}).items():
        _check_rows(f"each[{name!r}]", values, len(layers))
    return layers, dict(each or {})


def _check_rows(name: str, values, count: int):
    """Raises `ValueError` unless all leaves of a pytree have a row for each layer."""
    is_list = isinstance(values, list | tuple) and len(values) == count
    advice = "; stack a list: jax.tree.map(lambda *leaves: jnp.stack(leaves), *values)" * is_list
    try:
        found = stack_length(values, name)
    except ValueError as error:
        raise ValueError(f"{error}{advice}") from None
    if found != count:
        raise ValueError(f"{name} has {found} rows, there are {count} layers{advice}")


def kinds_of(
    layers: list,
    ignore: str | Sequence[str],
    attributes: Callable[[Any], dict | None] | None = None,
) -> tuple[int, ...]:
    """Returns the kind of each layer: 0, 1, ... in the order in which kinds first occur.

    Args:
      layers: At least one layer.
      ignore: Names of attributes that may differ within a kind.
      attributes: Returns the attributes of a node, and None for a value that is not a node; by
        default `attributes_of`.

    Raises:
      ValueError: There are several layers, and no two layers are of one kind. The error names the
        difference.
    """
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    attributes = attributes or attributes_of
    is_same = lambda i, k: all(
        name in ignore for *_, name in differences([layers[k], layers[i]], attributes)
    )
    order = grouped(len(layers), is_same)
    if all_differ(order):
        for text, name in differences(layers, attributes):
            if name not in ignore:
                advice = f" (ignore={name!r} where it makes no difference)" if name else ""
                raise ValueError(
                    f"no two layers are equal: {text}; {KINDS}{advice}, jaxckpt.chain takes "
                    "layers that all differ"
                )
    return order


# The clause of errors that says which lists are valid.
KINDS = "run takes equal layers, or several kinds of which one has two layers"


def grouped(count: int, is_same: Callable[[int, int], bool]) -> tuple[int, ...]:
    """Returns the kind of each layer.

    Args:
      count: The number of layers.
      is_same: `is_same(i, k)` says whether layer i has the kind of the earlier layer k.
    """
    firsts, order = [], []
    for i in range(count):
        found = next((kind for kind, k in enumerate(firsts) if is_same(i, k)), len(firsts))
        if found == len(firsts):
            firsts.append(i)
        order.append(found)
    return tuple(order)


def all_differ(order: Sequence[int]) -> bool:
    """Whether there are several layers, and no two layers are of one kind."""
    return 1 < len(order) == max(order) + 1


def differences(
    layers: list, attributes: Callable[[Any], dict | None]
) -> Iterator[tuple[str, str]]:
    """Yields each difference between the first layer and another: a clause and an attribute's name.

    Args:
      layers: At least one layer.
      attributes: As for `kinds_of`.
    """
    for place, layer in enumerate(layers[1:], start=1):
        for path, name, first, other in _differences(layers[0], layer, attributes):
            yield f"layers[0]{path} is {first} and layers[{place}]{path} is {other}", name


def _differences(
    first, other, attributes: Callable, path: str = "", name: str = ""
) -> Iterator[tuple]:
    """Yields `(path, name, first, other)` for each difference, with both values as short text.

    The name is empty if a value is an array: arrays are stacked, so `ignore` cannot apply.
    """
    name = "" if _is_array(first) or _is_array(other) else name
    if type(first) is not type(other):
        yield path, name, shown(first), shown(other)
    elif _is_array(first):
        if (first.shape, first.dtype) != (other.shape, other.dtype):
            yield path, name, shown(first), shown(other)
    elif (mine := attributes(first)) is not None:
        is_map, its = isinstance(first, Mapping), attributes(other)
        for key in dict.fromkeys((*mine, *its)):
            inner = f"{path}[{key!r}]" if is_map else f"{path}.{key}"
            if key in mine and key in its:
                yield from _differences(mine[key], its[key], attributes, inner, str(key))
            else:
                there = "there" if key in mine else "missing"
                yield inner, str(key), there, "missing" if key in mine else "there"
    elif isinstance(first, list | tuple) and len(first) == len(other):
        for place, pair in enumerate(zip(first, other, strict=True)):
            yield from _differences(*pair, attributes, f"{path}[{place}]", name)
    elif first is not other and not _equal(first, other):
        yield path, name, shown(first), shown(other)


def _is_array(value) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def attributes_of(value) -> dict | None:
    """Returns a dict of a module's or dataclass's attributes or a mapping's items; else None."""
    if isinstance(value, Mapping):
        return dict(value)
    is_node = not jax.tree_util.all_leaves([value]) or dataclasses.is_dataclass(value)
    is_object = is_node and hasattr(value, "__dict__") and not isinstance(value, type)
    return vars(value) if is_object else None


def _equal(first, other) -> bool:
    try:
        return bool(first == other)
    except (TypeError, ValueError):
        return False
