"""`run`: an unchanged list of Linen modules under a plan that counts the modules.

    x = jaxckpt.linen.run(self.blocks, x, mask, remat="sqrt")  # a list that setup() made

Every layer is traced once as a function of its variables and keys. Layers are of one kind if their
programs are equal except for numbers. One program of each kind runs all layers of the kind. The
list keeps its parameter tree, its random streams and its state.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core import lift
from flax.linen.transforms import lift_direct_transform
from jax.extend import core

from jaxckpt.linen.stack import fields
from jaxckpt.plans import Plan
from jaxckpt.plans.errors import shown
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms import programs
from jaxckpt.transforms.arguments import apart, part, put
from jaxckpt.transforms.checks import check_carry
from jaxckpt.transforms.layers import (
    KINDS,
    all_differ,
    attributes_of,
    check_layers,
    differences,
    grouped,
    in_order,
    run_rows,
    stacked,
)
from jaxckpt.transforms.traced_block import first_block


def run(
    layers: Sequence[nn.Module],
    carry,
    *args,
    out: int | str | Callable | None = None,
    each: Mapping[str, Any] | None = None,
    remat: str | Plan | Schedule | Callable = "sqrt",
    unroll: int = 1,
    **named,
):
    """Runs an unchanged list of Linen modules, checkpointed by a plan that counts the modules.

    `setup()` makes the list, and the parameter tree keeps the list's names (`blocks_0`, `blocks_1`,
    ...). Every layer draws the dropout masks that it draws in a Python loop. Sown values and batch
    statistics come back once.

    Args:
      layers: Bound modules of one or several kinds. Within a kind, modules may only differ in
        numbers, such as a rate. Each layer is traced once, as in a loop. One layer of each kind is
        compiled.
      carry: The first layer's input. `layer(carry, *args, **named, **each_i)` returns a carry of
        the same structure, shapes and dtypes, or a result that holds the carry at `out`.
      *args: Passed to every layer. Arrays get gradients. Python values, such as `True` and None,
        are passed unchanged.
      out, each, remat, unroll: As for `jaxckpt.run`.
      **named: Passed to every layer by keyword, such as `deterministic=True`.

    Returns:
      The last layer's carry; with `out`, the result of a layer with its other parts stacked.

    Raises:
      PlanError: As for `jaxckpt.scan_blocks`.
      ValueError: The list is empty, a module is not bound, all layers differ (the error names the
        difference), `out` is not in the result, or a layer changes the carry's shapes.
    """
    layers, each = check_layers(layers, each, "linen.run takes a list of Linen modules first, then")
    for place, layer in enumerate(layers):
        if not isinstance(layer, nn.Module):
            raise ValueError(
                f"linen.run takes Linen modules, and layers[{place}] is {shown(layer)}; "
                "jaxckpt.run takes pytrees and jaxckpt.nnx.run takes NNX modules"
            )
        if layer.scope is None:
            raise ValueError(
                f"layers[{place}] is not bound; call linen.run in a method of the module whose "
                "setup() made the list"
            )
    if layers[0].is_initializing():
        rests = []
        for i, layer in enumerate(layers):
            each_i = jax.tree.map(lambda x, i=i: x[i], each)
            carry, rest = part(layer(carry, *args, **named, **each_i), out)
            rests.append(rest)
        return put(carry, stacked(rests), out)

    traced = [_trace(layer, out, carry, first_block(each), args, named) for layer in layers]
    order = _kinds_of(layers, [one.program for one in traced])
    # All layers read these arrays, so they are not stacked.
    arrays, _ = apart((args, named))

    def step_of(program: core.ClosedJaxpr, made, place: int) -> Callable:
        check_carry(carry, made[0], f"layers[{place}]")
        call, tree = core.jaxpr_as_fun(program), jax.tree.structure(made)

        def step(carry, row, each_i):
            inputs, numbers = row
            flat = call(*inputs, *jax.tree.leaves((carry, each_i)), *arrays, *numbers)
            carry, rest, changed = jax.tree.unflatten(tree, flat)
            return carry, (rest, changed)

        return step

    steps: list[Callable] = []
    inputs: list[Any] = [None] * len(layers)
    for kind in range(max(order) + 1):
        mine = {i: one for i, one in enumerate(traced) if order[i] == kind}
        program, numbers = programs.one_program([one.program for one in mine.values()])
        first, one = next(iter(mine.items()))
        steps.append(step_of(program, one.made, first))
        for (i, one), row in zip(mine.items(), numbers, strict=True):
            inputs[i] = (one.inputs, row)
    has_rest = out is not None
    carry, ys = run_rows(
        steps, carry, inputs, each, order, has_rest=has_rest, remat=remat, unroll=unroll
    )
    for i, one in enumerate(traced):
        kind = order[i]
        if changed := ys[kind][1]:
            one.publish([leaf[order[:i].count(kind)] for leaf in changed])
    return put(carry, in_order([rest for rest, _ in ys], order), out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layer:
    """A bound module that was traced once.

    Attributes:
      program: A function of `inputs`, the carry, `each_i` and the call's arrays. It returns the
        leaves of `made`.
      inputs: The leaves of the module's variables and keys.
      made: The carry, the other parts of the result and the changed variables, abstract.
      publish: Stores the changed variables in the module's scope.
    """

    program: core.ClosedJaxpr
    inputs: list
    made: Any
    publish: Callable[[list], None]


def _trace(layer: nn.Module, out, carry, each_i, args, named) -> _Layer:
    """Returns a bound module, traced as a function of its variables and keys."""
    found = []

    def record(fn, scopes, carry, each_i, args, named):
        arrays, merge = apart((args, named))

        def inner(scopes_of, repack, variables, rngs):
            kept = []

            def pure(variables, rngs, carry, each_i, arrays):
                inside = scopes_of(variables, rngs)
                args, named = merge(arrays)
                carry, rest = part(fn(inside, carry, *args, **named, **each_i), out)
                with_changed, changed = _changed(variables, repack(inside))
                kept.append(with_changed)
                return carry, rest, changed

            trace = jax.make_jaxpr(pure, return_shape=True)
            program, made = trace(variables, rngs, carry, each_i, arrays)

            def publish(changed: list):
                state = kept[-1](variables, changed)
                lift.pack(lambda *_: (None, state), (True,), (True,), (True,))(scopes)

            inputs = jax.tree.leaves((variables, rngs))
            found.append(_Layer(program=program, inputs=inputs, made=made, publish=publish))
            return None, ()

        return lift.pack(inner, (True,), (True,), (True,), name="run")(scopes)

    def call_layer(layer, carry, *args, **named):
        return layer(carry, *args, **named)

    lift_direct_transform(record, (call_layer,), layer, carry, each_i, args, named)
    return found[0]


def _changed(before, after) -> tuple[Callable, list]:
    """Returns the leaves of a module's variables that a call changed or made.

    Args:
      before: The variables before the call.
      after: The writable variables after the call.

    Returns:
      A function and the changed leaves. The function takes variables before a call and their
      changed leaves, and returns the writable variables after that call.
    """
    given = dict(jax.tree_util.tree_leaves_with_path(before))
    paths, tree = jax.tree_util.tree_flatten_with_path(after)
    same = [leaf is given.get(path) for path, leaf in paths]

    def with_changed(before, changed: list):
        given, made = dict(jax.tree_util.tree_leaves_with_path(before)), iter(changed)
        pairs = zip(same, paths, strict=True)
        return jax.tree.unflatten(
            tree, [given[path] if kept else next(made) for kept, (path, _) in pairs]
        )

    changed = [leaf for kept, (_, leaf) in zip(same, paths, strict=True) if not kept]
    return with_changed, changed


def _kinds_of(layers: list, traced: list[core.ClosedJaxpr]) -> tuple[int, ...]:
    """Returns the kind of each layer; programs of one kind are equal except for numbers.

    Raises:
      ValueError: There are several layers, and no two layers are of one kind.
    """
    computed = [programs.without_numbers(program) for program in traced]
    order = grouped(len(layers), lambda i, k: computed[i] == computed[k])
    if not all_differ(order):
        return order
    found = [text for text, _ in differences(layers[:2], _attributes)]
    raise ValueError(
        f"no two layers are equal: "
        f"{'; '.join(found[:3]) or 'layers[0] and layers[1] compute differently'}; linen."
        f"{KINDS}, which may differ in numbers (random draws, a rate) outside of what nn.remat, "
        "nn.scan and nn.jit do inside a layer"
    )


def _attributes(value) -> dict | None:
    """Returns the values that are equal in equal layers: a module's fields and variables."""
    if isinstance(value, nn.Module):
        variables = {} if value.scope is None else {"variables": value.variables}
        return dict(fields(value)) | variables
    return attributes_of(value)
