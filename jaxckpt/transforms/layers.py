"""`run`: a list of layers as it is, under any plan.

    x = jaxckpt.run(model.layers, lambda layer, x, mask: layer(x, mask), x, mask, remat="sqrt")

For a model whose list of layers, checkpoints and optimizer state must stay as they are. Equal
layers are stacked inside the step and run by one loop, and their gradients come back in a list. The
stack is a copy of the layers' parameters, and its gradients are a second copy; parameters that are
stacked already (`scan_blocks`) need neither.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt.plans import Plan
from jaxckpt.plans.errors import shown
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms.arguments import apart, part, put
from jaxckpt.transforms.chain import chain
from jaxckpt.transforms.checks import check_consts, check_unroll, stack_length
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
    """Runs a list of equal layers, checkpointed by a plan.

    Args:
      layers: Pytrees of one structure, of equal shapes and equal Python values: Equinox modules,
        dataclasses of arrays, dicts.
      apply: `apply(layer, carry, *consts, **each_i)`, pure. It returns a carry of the same
        structure, shapes and dtypes, or a result that holds the carry at `out`.
      carry: The first layer's input, any pytree of arrays.
      *consts: Handed to every layer; arrays get gradients, Python values stay what they are.
      each: Keyword arguments that differ from layer to layer: pytrees of `[L, ...]`, such as
        `{"key": jax.random.split(key, L)}`.
      out: The place of the carry in the result of `apply`: an index, a key, or a function. The rest
        of a tuple or dict comes back stacked, `[L, ...]`. None if the result is the carry.
      ignore: Names of attributes that may differ between layers, such as `"layer_idx"`; every layer
        runs with the first layer's value.
      remat: A plan or its text, a schedule for L blocks, or a policy of `jax.checkpoint`.
      unroll: Layers unrolled in one trip of the loop. With L or more, and `out` None, there is no
        loop and no copy of the parameters.

    Returns:
      The last layer's carry; with `out`, the result of `apply`, its rest stacked.

    Raises:
      PlanError: The plan does not parse, does not fit L layers, or names what no layer has.
      ValueError: There are no layers, layers differ (the error names the difference), `each` has
        another length, `out` is not in the result, or `apply` changes the carry.
      NotImplementedError: `auto`, or a second derivative through the executor.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, jaxckpt
      >>> layers = [eqx.nn.Linear(8, 8, key=key) for key in jax.random.split(jax.random.key(0), 6)]
      >>> apply = lambda layer, x: jnp.tanh(layer(x))
      >>> loss = lambda layers: jaxckpt.run(layers, apply, jnp.ones(8), remat="full").sum()
      >>> len(eqx.filter_grad(loss)(layers))
      6
    """
    if not hasattr(layers, "__iter__") or isinstance(layers, Mapping | jax.Array | np.ndarray):
        raise ValueError(
            f"run takes a list of layers first, then apply and the carry; got {shown(layers)} "
            "(jaxckpt.scan_blocks takes stacked parameters)"
        )
    layers, each = list(layers), dict(each or {})
    if not callable(apply):
        raise ValueError(f"apply is a function apply(layer, carry, *consts), not {shown(apply)}")
    check_consts(consts)
    if not layers:
        raise ValueError("layers is an empty list; run needs at least one layer")
    _check_alike(layers, (ignore,) if isinstance(ignore, str) else tuple(ignore))
    check_unroll(unroll)
    for name, values in each.items():
        found = stack_length(values, f"each[{name!r}]")
        if found != len(layers):
            raise ValueError(f"each[{name!r}] has {found} rows, there are {len(layers)} layers")
    first, merge = apart(layers[0])
    arrays = [first, *(apart(layer)[0] for layer in layers[1:])]

    def step(carry, row):
        result = apply(merge(row["layer"]), carry, *consts, **row["each"])
        return part(result, out)

    if unroll >= len(layers) and out is None:
        row = lambda i: {"layer": arrays[i], "each": jax.tree.map(lambda x: x[i], each)}
        blocks = [lambda x, i=i: step(x, row(i))[0] for i in range(len(layers))]
        return chain(blocks, carry, remat=remat)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
    rows = {"layer": stacked, "each": each}
    return put(*scan(step, carry, rows, len(layers), unroll=unroll, remat=remat), out)


def _check_alike(layers: list, ignore: tuple[str, ...]):
    """Raises `ValueError` that names the first difference between two layers."""
    for place, layer in enumerate(layers[1:], start=1):
        for path, name, first, other in _differences(layers[0], layer):
            if name not in ignore:
                advice = f" (ignore={name!r} where it makes no difference)" if name else ""
                raise ValueError(
                    f"layers[0]{path} is {first} and layers[{place}]{path} is {other}; run takes "
                    f"equal layers{advice}, jaxckpt.chain takes layers that differ"
                )


def _differences(first, other, path: str = "", name: str = "") -> Iterator[tuple]:
    """Yields `(path, name, first, other)` for each difference, with both values as short text.

    The name is empty if a value is an array: arrays are stacked, so `ignore` cannot apply.
    """
    name = "" if _is_array(first) or _is_array(other) else name
    if type(first) is not type(other):
        yield path, name, shown(first), shown(other)
    elif _is_array(first):
        if (first.shape, first.dtype) != (other.shape, other.dtype):
            yield path, name, shown(first), shown(other)
    elif isinstance(first, Mapping) or _is_object(first):
        is_map = isinstance(first, Mapping)
        mine, its = (dict(one) if is_map else vars(one) for one in (first, other))
        for key in dict.fromkeys((*mine, *its)):
            inner = f"{path}[{key!r}]" if is_map else f"{path}.{key}"
            if key in mine and key in its:
                yield from _differences(mine[key], its[key], inner, str(key))
            else:
                there = "there" if key in mine else "missing"
                yield inner, str(key), there, "missing" if key in mine else "there"
    elif isinstance(first, list | tuple) and len(first) == len(other):
        for place, pair in enumerate(zip(first, other, strict=True)):
            yield from _differences(*pair, f"{path}[{place}]", name)
    elif first is not other and not _equal(first, other):
        yield path, name, shown(first), shown(other)


def _is_array(value) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def _is_object(value) -> bool:
    """Whether a value is a node with attributes: a module, a dataclass."""
    is_node = not jax.tree_util.all_leaves([value]) or dataclasses.is_dataclass(value)
    return is_node and hasattr(value, "__dict__") and not isinstance(value, type)


def _equal(first, other) -> bool:
    try:
        return bool(first == other)
    except (TypeError, ValueError):
        return False
