"""Findings: checks for remat that does nothing; each finding is one line with advice.

    for finding in findings_of_block(block, params_i, x, plan="dots_no_batch"):
        print(finding)

Checks of a block trace the block and run nothing. Checks of a step read reports and programs that
the caller has compiled. A finding is about a valid plan that misses its purpose. A plan that is not
valid raises `PlanError` instead.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
from jax.extend import core

from jaxckpt.compiled.buffers import Buffer
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.costs.flat import Flat, Step, bodies, flatten, where
from jaxckpt.costs.fusion import is_view
from jaxckpt.costs.residuals import Trace, check_arguments, checkpointed, is_identity, origin_of
from jaxckpt.costs.roofline import Rates, estimate
from jaxckpt.memory.finding import Finding
from jaxckpt.plans import Plan, Policy, Stage, as_plan, words
from jaxckpt.transforms import jaxprs, value_names
from jaxckpt.transforms.checks import check_policies
from jaxckpt.transforms.traced_block import abstract
from jaxckpt.units import iec

_FULL = Stage(schedule="full")


def findings_of_block(
    block: Callable, params_i, carry, *consts, plan: str | Plan
) -> tuple[Finding, ...]:
    """Returns a finding for each of a plan's policies that does nothing for a block.

    Args:
      block: `block(carry, params_i, *consts) -> carry`.
      params_i: The parameters of one block, arrays or abstract.
      carry: The block's input, arrays or abstract.
      *consts: Arrays that all blocks share.
      plan: A plan or its text.

    Raises:
      PlanError: The plan does not parse, or names a value that the block lacks.
    """
    plan = as_plan(plan)
    check_arguments(block, params_i, carry, consts)
    args = carry, params_i, *consts
    check_policies(plan, lambda asked: value_names.offered(block, asked, *args))
    found = []
    for stage in plan.stages:
        found += _dots_that_save_nothing(block, params_i, carry, consts, stage)
        found += _tags_that_save_nothing(block, args, stage)
    return tuple(dict.fromkeys(found))


def _dots_that_save_nothing(block, params_i, carry, consts, stage: Stage) -> Iterator[Finding]:
    """Yields a finding for each dots policy of a stage that keeps no more arrays than `full`."""
    for policy in stage.policies:
        if policy.kind not in ("dots", "dots_no_batch"):
            continue
        full, kept = (
            len(Trace(checkpointed(block, alone), params_i, carry, consts).residuals)
            for alone in (_FULL, dataclasses.replace(_FULL, policies=(policy,)))
        )
        if kept <= full:
            flat = flatten(jax.make_jaxpr(block)(carry, params_i, *consts))
            message = f"policy {policy} saves nothing: {_why_no_dots(policy, flat)}"
            yield Finding(code="dots-save-nothing", message=message)


def _why_no_dots(policy: Policy, flat: Flat) -> str:
    products = [step for step in _all_steps(flat) if step.name == jaxprs.DOT]
    if not products:
        return "the block has no matmul; leave it out, or keep tagged values with names:..."
    batched = [step for step in products if step.params["dimension_numbers"][1] != ((), ())]
    if policy.kind == "dots_no_batch" and len(batched) == len(products):
        return (
            f"every matmul of the block ({len(products)}) has batch dimensions; use dots, or keep "
            "tagged values with names:..."
        )
    return "the backward pass needs none of the outputs that it may keep; leave it out"


def _tags_that_save_nothing(block: Callable, args: tuple, stage: Stage) -> Iterator[Finding]:
    """Yields a finding for every name of a stage whose value saves no recomputation."""
    patterns = [policy for policy in stage.inner_policies if policy.names]
    if not patterns:
        return
    tags = value_names.offered(block, patterns, *args)
    offered = (*tags.names, *tags.invented)
    flat = flatten(jax.make_jaxpr(block)(*args))
    outputs = {origin_of(value) for value in flat.outputs}
    on_outputs = {
        step.params["name"]
        for step in flat.steps
        if step.name == jaxprs.TAG and origin_of(step.outputs[0]) in outputs
    }
    num_steps = functools.cache(functools.partial(_num_steps, block, args))
    for policy in patterns:
        kind = policy.kind
        for name in _matching(policy, offered):
            if _is_useful(num_steps, stage, kind, name, offered):
                continue
            if name in on_outputs:
                message = (
                    f"{kind}:{name} does nothing: {name!r} is on the block's output, which the "
                    "next block keeps as its input anyway; leave it out, or write offload:carry to "
                    "move the carries"
                )
                yield Finding(code="tag-on-output", message=message)
            else:
                message = (
                    f"{kind}:{name} spares no recomputation: the backward pass does not ask for "
                    f"{name!r}, or makes what it is made from anyway; tag what the next "
                    "operation's derivative reads, such as the input of a nonlinearity "
                    "(jaxckpt.explain lists it)"
                )
                yield Finding(code="tag-not-needed", message=message)


def _is_useful(num_steps: Callable[[Stage], int], stage: Stage, kind: str, name: str, offered):
    """Whether keeping `name` saves a step, alone or in addition to the stage's other values."""
    alone = dataclasses.replace(_FULL, policies=(Policy(kind=kind, names=(name,)),))
    if num_steps(alone) < num_steps(_FULL):
        return True
    everything = _exact(stage, offered)
    return num_steps(everything) < num_steps(_exact(stage, offered, without=(kind, name)))


def _exact(stage: Stage, offered, without: tuple[str, str] | None = None) -> Stage:
    """Returns a `full` stage with a stage's policies, with whole names instead of patterns.

    Args:
      stage: The stage.
      offered: The names that the block has.
      without: The policy kind and the name that are left out; None to leave out nothing.
    """
    policies = []
    for policy in stage.inner_policies:
        names = tuple(n for n in _matching(policy, offered) if (policy.kind, n) != without)
        if names or not policy.names:
            policies.append(dataclasses.replace(policy, names=names))
    return dataclasses.replace(_FULL, policies=tuple(policies))


def _matching(policy: Policy, offered: Iterable[str]) -> list[str]:
    return [name for name in offered if any(words.matches(name, p) for p in policy.names)]


def _num_steps(block: Callable, args, stage: Stage) -> int:
    """Returns the number of steps of a block's forward and backward pass, without views."""
    fn = checkpointed(block, stage)

    def both(args, grads):
        out, reverse = jax.vjp(fn, *args)
        return out, reverse(grads)

    grads = jax.tree.map(lambda x: x.to_tangent_aval(), abstract(jax.eval_shape(fn, *args)))
    flat = flatten(jax.make_jaxpr(both)(args, grads))
    return sum(not (is_identity(step) or is_view(step)) for step in flat.live_steps())


def _all_steps(flat: Flat) -> list[Step]:
    inner = [found for step in flat.steps for body in bodies(step) for found in _all_steps(body)]
    return [*flat.steps, *inner]


def carry_slow_to_move(
    block: Callable, params_i, carry, *consts, plan: str | Plan, rates: Rates
) -> tuple[Finding, ...]:
    """Returns a finding if moving a schedule's carry to the host takes longer than a block.

    Args:
      block: `block(carry, params_i, *consts) -> carry`.
      params_i: The parameters of one block, arrays or abstract.
      carry: The block's input, arrays or abstract.
      *consts: Arrays that all blocks share.
      plan: A plan or its text.
      rates: The rates of the chip.
    """
    is_moved = lambda stage: stage.offloads_carry and words.SCHEDULES[stage.schedule].makes
    stage = next(filter(is_moved, as_plan(plan).stages), None)
    if stage is None:
        return ()
    seconds = estimate(jax.make_jaxpr(block)(carry, params_i, *consts), rates).seconds
    leaves = jax.tree.leaves(abstract(carry))
    moved = sum(x.size * x.dtype.itemsize for x in leaves) / rates.host_bytes_per_second
    if moved <= seconds:
        return ()
    message = (
        f"{stage} sends every carry that it keeps to the host: {1e3 * moved:.3g} ms for each, "
        f"where a block takes {1e3 * seconds:.3g} ms; keep them on the device, or send one of "
        "several to the host (scan segments under full+offload:carry, a schedule inside)"
    )
    return (Finding(code="carry-slow-to-move", message=message),)


def head_sets_peak(
    buffers: Iterable[Buffer], *, tokens: int, vocab_size: int, stack_bytes: int
) -> tuple[Finding, ...]:
    """Returns a finding if the logits at the peak have more bytes than the plan can change.

    Args:
      buffers: `MemoryReport.buffers`; the buffers do not share memory.
      tokens: The number of tokens of one step on one device.
      vocab_size: The size of the vocabulary on one device.
      stack_bytes: Bytes that the stack keeps on one device, plus one block's residuals. This is L
        times `Explanation.saved_bytes`, plus `Explanation.residual_bytes`.
    """
    logits = [buffer for buffer in buffers if _is_logits(buffer, tokens, vocab_size)]
    size = sum(buffer.size_bytes for buffer in logits)
    if size <= stack_bytes:
        return ()
    message = (
        f"the loss head sets the peak, not the stack: logits {logits[0].shape} take {iec(size)} "
        f"there, all that the stack keeps {iec(stack_bytes)}; no plan for the stack helps, a loss "
        "in chunks of tokens does (jaxckpt.losses)"
    )
    return (Finding(code="head-sets-peak", message=message),)


def _is_logits(buffer: Buffer, tokens: int, vocab_size: int) -> bool:
    """Whether a buffer has shape `[..., vocab_size]` and its leading axes hold all tokens."""
    found = re.fullmatch(r"\w+\[([\d,]+)\].*", buffer.shape)
    if not found:
        return False
    *rows, last = map(int, found[1].split(","))
    return last == vocab_size and math.prod(rows) == tokens


# The values of one block set the peak if they are more than this share of the bytes at the peak.
_MOST_OF_PEAK = 0.5


def block_sets_peak(
    block: Callable, params_i, carry, *consts, plan: str | Plan, report: MemoryReport
) -> tuple[Finding, ...]:
    """Returns a finding if most of the peak of a checkpointed step is values of a single block.

    Args:
      block: `block(carry, params_i, *consts) -> carry`.
      params_i: The parameters of one block, arrays or abstract.
      carry: The block's input, arrays or abstract.
      *consts: Arrays that all blocks share.
      plan: The plan of the step, or its text. Under `none` there is no finding, because another
        plan helps.
      report: The report of the step under the plan.
    """
    if any(stage.schedule == "none" for stage in as_plan(plan).stages):
        return ()
    steps = _all_steps(flatten(jax.make_jaxpr(block)(carry, params_i, *consts)))
    # Values inside a function with a custom derivative have the line of the call in XLA.
    calls = (Step(equation=call, inputs=()) for step in steps for call in step.calls)
    lines = {where(step) for step in (*steps, *calls)} - {""}
    made = [buffer for buffer in report.buffers if Path(buffer.source).name in lines]
    size, alive = (sum(one.size_bytes for one in some) for some in (made, report.buffers))
    if size <= _MOST_OF_PEAK * alive:
        return ()
    message = (
        f"the values of one block set the peak: {iec(size)} of the {iec(alive)} that are alive "
        f"there, the largest {made[0].shape} made at {Path(made[0].source).name}; no "
        "plan for the stack helps, fewer positions at once do (jaxckpt.tiled, --mlp-tiles; "
        "attention in chunks; fewer sequences a microbatch)"
    )
    return (Finding(code="block-sets-peak", message=message),)


# XLA's text shows a matrix product as `dot`, on TPU as `convolution`, on GPU often as a library
# call.
_PRODUCT = re.compile(r"=\s+\S+\s+(?:dot|convolution)\(")
_LIBRARY = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul)[^"]*"')


def undone_remat(
    plan: str | Plan,
    compiled_text: str,
    jaxpr: core.ClosedJaxpr,
    none_jaxpr: core.ClosedJaxpr,
) -> tuple[Finding, ...]:
    """Returns a finding if the compiled step lacks the matrix products that the jaxpr recomputes.

    Args:
      plan: The plan of the step.
      compiled_text: `compiled.as_text()` of the step under the plan.
      jaxpr: The jaxpr of the step under the plan.
      none_jaxpr: The jaxpr of the step under `none`, at the same unroll.
    """
    expected, plain = count_products(jaxpr), count_products(none_jaxpr)
    made = len(_PRODUCT.findall(compiled_text)) + len(_LIBRARY.findall(compiled_text))
    if expected <= plain or made > plain:
        return ()
    message = (
        f"plan {str(plan)!r} is undone by the compiler: {made} matmuls are left of the {expected} "
        f"that the step asks for, {plain} without remat; common-subexpression elimination merged "
        "unrolled blocks with their recomputation; use unroll=1 (a loop keeps them apart)"
    )
    return (Finding(code="remat-undone", message=message),)


def count_products(jaxpr: core.ClosedJaxpr) -> int:
    """Returns how many matrix products a compiled program has; a loop's body counts once.

    The body of an unrolled scan counts once for each copy in a trip.
    """
    return _num_products(flatten(jaxpr))


def _num_products(flat: Flat) -> int:
    count = 0
    for step in flat.live_steps():
        copies = 1
        if step.name == jaxprs.SCAN:
            length, unroll = step.params["length"], int(step.params["unroll"])
            copies = min(length, unroll + length % unroll)
        inside = sum(_num_products(body) for body in bodies(step))
        count += (step.name == jaxprs.DOT) + copies * inside
    return count
