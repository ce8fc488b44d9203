"""The residuals of one block, read from the jaxpr of its `jax.vjp` rather than guessed.

`jax.vjp` hands back a function whose leaves are what the backward pass will read. Here the block is
traced, once as it is and once under a plan's `jax.checkpoint`, and each leaf is followed to the
step that makes it. Steps of two traces that compute the same thing from the same inputs get the
same key, so a residual can be looked up in the other trace.

A plan can name values that nobody tagged (`@dot.2`). `transforms.value_names` puts a tag on each of
them, and these tags are found again in the steps of the block's `jax.vjp`. A tag in a loop's body
belongs to what the loop stacks of it.
"""

import dataclasses
import re
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
from jaxckpt.transforms.traced_block import abstract, first_block

# Steps whose output is their input: a tag, a copy, a move.
_IDENTITIES = frozenset((jaxprs.TAG, jaxprs.PUT, *jaxprs.COPIES))
_KERNELS = tags.ATTENTION_PRIMITIVES | {jaxprs.PALLAS}
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def single_stage(plan: str | Plan) -> Stage:
    """Returns the one stage of a plan.

    Raises:
      PlanError: Several stages, whose blocks are treated differently, or `auto`.
    """
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

    Seen by what the block returns: a carry like the one it was given, or not.
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
    except Exception:  # of the block's, of any type: it is called with what may not be meant for it
        return False
    return True


def checkpointed(block: Callable, stage: Stage, given: GivenPolicy | None = None) -> Callable:
    """Returns `block` as a stage differentiates one block of the live segment.

    `none`, and segments without policies, keep all; the other schedules keep a block's input and
    what their policies say, or the user's own policy.
    """
    policies = stage.policies
    if words.SCHEDULES[stage.schedule].keeps_segments:
        # The segment's input is what goes to the host, not the inputs of its blocks.
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
    """One leaf that the backward pass is handed.

    Attributes:
      value: The leaf.
      origin: The value that it is, seen through tags, roundings and moves.
      key: Equal for equal computations, also between traces of the same block.
      is_host: Whether it waits in host memory.
    """

    value: Value
    origin: Value
    key: tuple
    is_host: bool


class Trace:
    """One trace of `jax.vjp(block)`: its steps and the leaves handed to the backward pass.

    Attributes:
      flat: The forward pass; its outputs are the leaves.
      residuals: The leaves that are neither a parameter, nor a const, nor closed over; each once.
      shared: The leaves that are, each once: they are read again, not saved.
      carry: The block's input, as values, but for what it hands on as it is.
      labels: For inputs and constants, how a reader would call them.
      tags: For origins, the users' tags they carry.
      kernels: For origins that an attention kernel keeps for its backward pass, the kernel's key.
      moving: Values that depend on the carry.
    """

    def __init__(
        self, block: Callable, params_i, carry, consts: tuple, handed_on: Collection[int] = ()
    ):
        """Traces a block.

        Args:
          block: The block, as it is or under a plan.
          params_i: Its parameters.
          carry: Its input.
          consts: What all blocks share.
          handed_on: The carry's leaves that it hands on as they are: all blocks share them too.
        """
        leaves_of = lambda *args: jax.tree.leaves(jax.vjp(block, *args)[1])
        args = (carry, params_i, *consts)
        self.flat = flatten(jax.make_jaxpr(leaves_of)(*args))
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
        """Finds what users have tagged, and the arrays of each attention kernel."""
        kernel = None
        for step in self.flat.steps:
            if step.name == jaxprs.TAG and step.params["name"] == tags.ATTENTION:
                # A kernel of our own tags all its arrays at once.
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
        space = getattr(value.aval, "memory_space", None)
        self.residuals.append(
            Residual(
                value=value,
                origin=origin,
                key=self._key(origin),
                is_host=space == jax.memory.Space.Host,
            )
        )

    def _add_keys(self, step: Step):
        if is_identity(step):
            self._keys[step.outputs[0]] = self._key(step.inputs[0])
            return
        made = step.name, *_describe(step)
        if step.name == jaxprs.PALLAS or not any(True for _ in jaxprs.subjaxprs(step.equation)):
            made = *made, *(self._key(value) for value in step.inputs)
        for place, value in enumerate(step.outputs):
            # A loop returns more arrays in one trace than in another: places are counted by shape.
            shape = tuple(value.aval.shape), str(value.aval.dtype)
            place = sum(tuple(other.aval.shape) == shape[0] for other in step.outputs[:place])
            # Hashed, so that keys of keys stay small.
            self._keys[value] = ("step", hash((made, shape, place)))

    def key_of(self, value: Value) -> tuple:
        """Returns what is equal for equal computations, also between traces of one block."""
        return self._key(origin_of(value))

    def _key(self, value: Value) -> tuple:
        if value in self._keys:
            return self._keys[value]
        constant = value.constant
        if isinstance(constant, Tracer) or _is_large_or_key(value.aval):
            return ("constant", id(constant))
        array = np.asarray(constant)
        return ("constant", str(array.dtype), array.shape, array.tobytes())


def _is_large_or_key(aval) -> bool:
    """Whether an array is told apart by being the same object, not by what it holds."""
    return aval.size > 64 or jnp.issubdtype(aval.dtype, jax.dtypes.extended)


def origin_of(value: Value) -> Value:
    """Returns what `value` is, seen through tags, roundings and moves."""
    while value.step is not None and is_identity(value.step):
        value = value.step.inputs[0]
    return value


def is_identity(step: Step) -> bool:
    """Whether a step's output has the bits of its input."""
    if step.name == jaxprs.ROUND:
        # `jax.checkpoint` rounds what it keeps to the dtype it has; a user's may round for real.
        finfo = jax.numpy.finfo(step.outputs[0].aval.dtype)
        bits = step.params["exponent_bits"], step.params["mantissa_bits"]
        return bits == (finfo.nexp, finfo.nmant)
    return step.name in _IDENTITIES


def slice_of(values) -> list[Step]:
    """Returns every step needed to make `values` from the block's inputs, each once."""
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
            yield next(inputs), "/".join([name, *map(_key_text, path)])
    for value in flat.constants:
        yield value, "a closed-over array"


def _key_text(key) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _describe(step: Step) -> tuple[str, ...]:
    """Returns the parameters that say what a step computes, as text.

    Of a loop it is its place: its functions differ between traces, because a loop under `jax.vjp`
    returns residuals of its own. Of a kernel it is the function's name and place.
    """
    if step.name == jaxprs.PALLAS:
        return (str(step.params.get("name_and_src_info")),)
    if any(True for _ in jaxprs.subjaxprs(step.equation)):
        return (where(step),)
    return tuple(
        f"{name}={_ADDRESS.sub('', repr(value))}" for name, value in sorted(step.params.items())
    )


def all_named(block: Callable, *, opens_remat: bool = False) -> Callable:
    """Returns a block with a tag on all that can have one; see `value_names.named`."""
    return value_names.named(block, lambda name: True, opens_remat=opens_remat)


def values_by_name(flat: Flat) -> dict[str, tuple[Value, ...]]:
    """Returns the values of each invented name, in the order of the steps that make them.

    Args:
      flat: The forward pass of a block made by `all_named`.
    """
    found: dict[str, tuple[Value, ...]] = {}
    for value, names in _names(flat).items():
        for name in names:
            found[name] = (*found.get(name, ()), value)
    return found


def names_by_key(block: Callable, params_i, carry, consts: tuple) -> dict[tuple, str]:
    """Returns the invented names of a block's values by the keys of `Trace`.

    A trace of the block as it is has the same keys; with a tag on all values it would keep some of
    them twice, once with and once without.
    """
    trace = Trace(all_named(block), params_i, carry, consts)
    found = values_by_name(trace.flat).items()
    return {trace.key_of(value): name for name, values in found for value in values}


def _names(flat: Flat) -> dict[Value, list[str]]:
    """Returns the invented names of values."""
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
    """Yields outputs of a loop or branch with the names that they have in its functions."""
    for body in bodies(step):
        names = _names(body)
        for outer, inner in zip(step.outputs, body.outputs, strict=False):
            if origin_of(inner) in names:
                yield outer, names[origin_of(inner)]
