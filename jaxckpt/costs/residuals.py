"""The residuals of one block, read from the jaxpr of its `jax.vjp` rather than guessed.

`jax.vjp` returns a function whose leaves are the residuals. The block is traced twice, without a
plan and under the plan's `jax.checkpoint`, and each leaf is followed to the step that makes it.
Equal computations have equal keys in both traces, so a residual can be looked up in the other one.

A plan can name values without a tag (`@dot.2`). `transforms.value_names` tags these, and the
tags are found in the steps of the block's `jax.vjp`. A tag in a loop's body names the loop's
stacked output.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxckpt.costs.flat import Flat, Step, Value, bodies, flatten, where
from jaxckpt.costs.flops import is_kernel
from jaxckpt.plans import Plan, PlanError, Stage, as_plan, words
from jaxckpt.transforms import jaxprs, tags, value_names
from jaxckpt.transforms.checkpointed import Remat
from jaxckpt.transforms.checks import check_carry
from jaxckpt.transforms.policies import GivenPolicy
from jaxckpt.transforms.traced_block import abstract, first_block, without_addresses

# Steps that return their input: a tag, a copy, a move.
_IDENTITIES = frozenset((jaxprs.TAG, jaxprs.PUT, *jaxprs.COPIES))
_KERNELS = tags.ATTENTION_PRIMITIVES | {jaxprs.PALLAS}


def single_stage(plan: str | Plan) -> Stage:
    """Returns the one stage of a plan; raises `PlanError` for several stages and for `auto`."""
    plan = as_plan(plan)
    if len(plan.stages) > 1:
        raise PlanError(
            f"plan {str(plan)!r} treats blocks in {len(plan.stages)} ways; "
            f"ask for one stage, such as {str(plan.stages[0])!r}"
        )
    stage = next(iter(plan.stages))
    if stage.schedule == "auto":
        raise PlanError("auto names no plan yet; ask for one, such as 'full'")
    return stage


def check_arguments(block: Callable, params_i, carry, consts: tuple):
    """Raises `ValueError` if a block is given the whole stack, or its arguments in another order.

    With the right arguments the block's output has the structure, shapes and dtypes of its input.
    """
    if not callable(block):
        raise ValueError(f"the first argument is the block, a function, not {type(block).__name__}")
    if _keeps_carry(block, params_i, carry, consts):
        return
    if _keeps_carry(block, carry, params_i, consts):
        raise ValueError(
            "params_i and carry have changed places: the order is (block, params_i, carry, *consts)"
        )
    sizes = {jax.typeof(leaf).shape[:1] for leaf in jax.tree.leaves(params_i)}
    if len(sizes) == 1 and sizes != {()}:
        ((length,),) = sizes
        if length and _keeps_carry(block, first_block(params_i), carry, consts):
            raise ValueError(
                f"params_i has a leading axis of {length} in every leaf: one block's parameters "
                "are wanted, such as jax.tree.map(lambda x: x[0], params)"
            )


def _keeps_carry(block: Callable, params_i, carry, consts: tuple) -> bool:
    try:
        check_carry(carry, jax.eval_shape(block, *abstract((carry, params_i, *consts))))
    except Exception:  # the block may raise anything: its arguments may be the wrong ones
        return False
    return True


def checkpointed(block: Callable, stage: Stage, given: GivenPolicy | None = None) -> Callable:
    """Returns `block` in the form that a stage differentiates: one block of the live segment.

    Under `none`, and in segments without policies, it keeps all residuals. Other schedules keep a
    block's input and the values that their policies, or the user's own policy, keep.
    """
    policies = stage.policies
    if words.SCHEDULES[stage.schedule].keeps_segments:
        # `offload:carry` moves the segment's input to the host, not the inputs of its blocks.
        policies = stage.inner_policies
        if not policies:
            return block
    if stage.schedule == "none":
        return block
    block = value_names.resolved(block, policies)
    how = Remat(policies=policies, given=given)
    remat = how(lambda carry, rest: block(carry, *rest), prevent_cse=True)
    return lambda carry, *rest: remat(carry, rest)


@dataclasses.dataclass(eq=False, kw_only=True)
class Residual:
    """One residual: a leaf that the backward pass reads.

    Attributes:
      value: The leaf.
      origin: The value that the leaf is, behind tags, roundings and moves.
      key: A key that is equal for equal computations, in any trace of the block.
      is_host: Whether the leaf is in host memory.
    """

    value: Value
    origin: Value
    key: tuple
    is_host: bool


class Trace:
    """One trace of `jax.vjp(block)`: the steps of the forward pass and its residuals.

    Attributes:
      flat: The forward pass; its outputs are the leaves that the backward pass reads.
      residuals: The leaves that the block makes, each once.
      results: The leaves of the block's output.
      shared: The leaves that are parameters, consts or closed over, each once: they are read again,
        not saved.
      carry: The values of the block's input, except leaves that it returns unchanged.
      labels: For inputs and constants, a name that a reader knows.
      tags: For origins, the users' tags on them.
      kernels: For residuals of an attention kernel, by origin, the kernel's key.
      moving: The values that depend on the carry.
    """

    def __init__(
        self, block: Callable, params_i, carry, consts: tuple, handed_on: Collection[int] = ()
    ):
        """Traces a block, bare or under a plan's `jax.checkpoint`.

        `handed_on` has the positions of the carry's leaves that the block returns unchanged, so
        that all blocks share them.
        """
        args = (carry, params_i, *consts)
        trace = jax.make_jaxpr(lambda *args: jax.vjp(block, *args)[::-1], return_shape=True)
        jaxpr, (reverse, _) = trace(*args)
        both, count = flatten(jaxpr), len(jax.tree.leaves(reverse))
        self.flat = dataclasses.replace(both, outputs=both.outputs[:count])
        self.results = both.outputs[count:]
        inputs = enumerate(self.flat.inputs[: len(jax.tree.leaves(carry))])
        self.carry = [value for place, value in inputs if place not in handed_on]
        self.labels = dict(_labels(self.flat, args))
        self._keys: dict[Value, tuple] = {}
        for place, value in enumerate(self.flat.inputs):
            self._keys[value] = ("input", place)
        self.moving = set(self.carry)
        for step in self.flat.steps:
            self._add_keys(step)
            if not self.moving.isdisjoint(step.inputs):
                self.moving.update(step.outputs)
        self.tags: dict[Value, list[str]] = {}
        self.kernels: dict[Value, tuple] = {}
        self._add_names()
        self.residuals, self.shared = [], []
        for value in dict.fromkeys(self.flat.outputs):
            self._add_leaf(value)

    def _add_names(self):
        """Finds the values with users' tags, and the residuals of each attention kernel."""
        kernel = None
        for step in self.flat.steps:
            if step.name == jaxprs.TAG and step.params["name"] == tags.ATTENTION:
                # One of our own kernels: it tags all its residuals, one after another.
                origin = origin_of(step.outputs[0])
                kernel = kernel or self._key(origin)
                self.kernels[origin] = kernel
            elif not is_identity(step):
                kernel = None
            if step.name in _KERNELS:
                first = self._key(step.outputs[0])
                self.kernels.update((value, first) for value in step.outputs)
            if step.name == jaxprs.TAG and not tags.is_reserved(step.params["name"]):
                origin = origin_of(step.outputs[0])
                self.tags.setdefault(origin, []).append(step.params["name"])

    def _add_leaf(self, value: Value):
        origin = origin_of(value)
        if origin in self.labels and origin not in self.carry:
            self.shared.append(origin)
            return
        is_host = getattr(value.aval, "memory_space", None) == jax.memory.Space.Host
        key = self._key(origin)
        self.residuals.append(Residual(value=value, origin=origin, key=key, is_host=is_host))

    def _add_keys(self, step: Step):
        if is_identity(step):
            self._keys[step.outputs[0]] = self._key(step.inputs[0])
            return
        made = step.name, *_describe(step)
        if step.name == jaxprs.PALLAS or not any(True for _ in jaxprs.subjaxprs(step.equation)):
            made = *made, *(self._key(value) for value in step.inputs)
        for place, value in enumerate(step.outputs):
            # A loop may return more arrays in one trace than in another: places count equal shapes.
            shape = tuple(value.aval.shape), str(value.aval.dtype)
            place = sum(tuple(other.aval.shape) == shape[0] for other in step.outputs[:place])
            # Keys contain keys; hashes keep them small.
            self._keys[value] = ("step", hash((made, shape, place)))

    def key_of(self, value: Value) -> tuple:
        """Returns a key that is equal for equal computations, in any trace of the block."""
        return self._key(origin_of(value))

    def _key(self, value: Value) -> tuple:
        if value in self._keys:
            return self._keys[value]
        constant, is_key = value.constant, jnp.issubdtype(value.aval.dtype, jax.dtypes.extended)
        if isinstance(constant, Tracer) or is_key or value.aval.size > 64:
            return ("constant", id(constant))
        array = np.asarray(constant)
        return ("constant", str(array.dtype), array.shape, array.tobytes())


def origin_of(value: Value) -> Value:
    """Returns the value behind the tags, roundings and moves of `value`."""
    while value.step is not None and is_identity(value.step):
        value = value.step.inputs[0]
    return value


def is_identity(step: Step) -> bool:
    """Whether a step's output has the bits of its input."""
    if step.name == jaxprs.ROUND:
        # `jax.checkpoint` rounds kept values to their own dtype; a user's rounding may change bits.
        finfo = jax.numpy.finfo(step.outputs[0].aval.dtype)
        bits = step.params["exponent_bits"], step.params["mantissa_bits"]
        return bits == (finfo.nexp, finfo.nmant)
    return step.name in _IDENTITIES


def slice_of(values) -> list[Step]:
    """Returns every step that computes `values` from the block's inputs, each once."""
    found: dict[Step, None] = {}
    todo = [value.step for value in values]
    while todo:
        step = todo.pop()
        if step is not None and step not in found:
            found[step] = None
            todo += [value.step for value in step.inputs]
    return list(found)


def _labels(flat: Flat, args) -> Iterator[tuple[Value, str]]:
    names = ("carry", "params_i", *(f"consts[{i}]" for i in range(len(args) - 2)))
    inputs = iter(flat.inputs)
    for name, tree in zip(names, args, strict=True):
        for path, _ in jax.tree_util.tree_leaves_with_path(tree):
            keys = jax.tree_util.keystr(path, simple=True, separator="/")
            yield next(inputs), f"{name}/{keys}" if path else name
    for value in flat.constants:
        yield value, "a closed-over array"


def _describe(step: Step) -> tuple[str, ...]:
    """Returns the parameters that define what a step computes, as text.

    A loop is described by its source line, because its functions differ between traces: a loop
    under `jax.vjp` returns residuals of its own. A kernel is described by its name and source line.
    """
    if step.name == jaxprs.PALLAS:
        return (str(step.params.get("name_and_src_info")),)
    if any(True for _ in jaxprs.subjaxprs(step.equation)):
        return (where(step),)
    params = sorted(step.params.items())
    return tuple(f"{name}={without_addresses(repr(value))}" for name, value in params)


def all_named(block: Callable, *, opens_remat: bool = False) -> Callable:
    """Returns a block with a tag on each value that can have an invented name."""
    return value_names.named(block, lambda name: True, opens_remat=opens_remat)


def values_by_name(flat: Flat) -> dict[str, tuple[Value, ...]]:
    """Returns the values of each invented name in a block of `all_named`, in order."""
    found: dict[str, tuple[Value, ...]] = {}
    for value, names in _names(flat).items():
        for name in names:
            found[name] = (*found.get(name, ()), value)
    return found


def names_by_key(block: Callable, params_i, carry, consts: tuple) -> dict[tuple, str]:
    """Returns the invented names of a block's values by the keys of `Trace`.

    A trace of the block without these tags has the same keys. The tagged block itself may keep a
    value twice, once with its tag and once without.
    """
    trace = Trace(all_named(block), params_i, carry, consts)
    found = values_by_name(trace.flat).items()
    return {trace.key_of(value): name for name, values in found for value in values}


def _names(flat: Flat) -> dict[Value, list[str]]:
    found: dict[Value, list[str]] = {}
    for step in flat.steps:
        if step.name == jaxprs.TAG:
            name = tags.invented_name(step.params["name"])
            if name is not None:
                found.setdefault(origin_of(step.outputs[0]), []).append(name)
        elif not is_kernel(step):
            for value, names in _inside(step):
                found.setdefault(value, []).extend(names)
    return found


def _inside(step: Step):
    """Yields outputs of a loop or branch with their invented names in its functions."""
    for body in bodies(step):
        names = _names(body)
        for outer, inner in zip(step.outputs, body.outputs, strict=False):
            if origin_of(inner) in names:
                yield outer, names[origin_of(inner)]
