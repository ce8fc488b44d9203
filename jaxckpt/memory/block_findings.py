"""Policies that do nothing for a block, found by tracing it; see `findings.py`."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax

from jaxckpt.memory.finding import Finding
from jaxckpt.memory.flat import Flat, Step, bodies, flatten
from jaxckpt.memory.fusion import is_view
from jaxckpt.memory.residuals import Trace, check_arguments, checkpointed, is_identity, origin_of
from jaxckpt.plans import Plan, Policy, Stage, as_plan, words
from jaxckpt.transforms import invented, jaxprs
from jaxckpt.transforms.blocks import check_policies

_FULL = Stage(schedule="full")


def findings_of_block(
    block: Callable, params_i, carry, *consts, plan: str | Plan
) -> tuple[Finding, ...]:
    """Returns what a plan's policies do not do for a block, each once, in the plan's order.

    Args:
      block: `block(carry, params_i, *consts) -> carry`.
      params_i: The parameters of one block, arrays or abstract.
      carry: The block's input, arrays or abstract.
      *consts: What all blocks share.
      plan: A plan or its text.

    Raises:
      PlanError: The plan does not parse, or names what the block has not.
    """
    plan = as_plan(plan)
    check_arguments(block, params_i, carry, consts)
    args = carry, params_i, *consts
    check_policies(plan, lambda asked: invented.offered(block, asked, *args))
    found = []
    for stage in plan.stages:
        found += dots_that_save_nothing(block, params_i, carry, *consts, stage=stage)
        found += tags_that_save_nothing(block, params_i, carry, *consts, stage=stage)
    return tuple(dict.fromkeys(found))


def dots_that_save_nothing(
    block: Callable, params_i, carry, *consts, stage: Stage
) -> tuple[Finding, ...]:
    """Returns a finding if a stage has a dots policy that keeps no array more than `full`."""
    found = []
    for policy in stage.policies:
        if policy.kind not in ("dots", "dots_no_batch"):
            continue
        kept = [
            len(Trace(checkpointed(block, alone), params_i, carry, consts).residuals)
            for alone in (_FULL, dataclasses.replace(_FULL, policies=(policy,)))
        ]
        if kept[1] <= kept[0]:
            flat = flatten(jax.make_jaxpr(block)(carry, params_i, *consts))
            message = f"policy {policy} saves nothing: {_why_no_dots(policy, flat)}"
            found.append(Finding(code="dots-save-nothing", message=message))
    return tuple(found)


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


def tags_that_save_nothing(
    block: Callable, params_i, carry, *consts, stage: Stage
) -> tuple[Finding, ...]:
    """Returns a finding for every name of a stage whose value spares the backward pass no step."""
    args = carry, params_i, *consts
    patterns = [policy for policy in stage.inner_policies if policy.names]
    if not patterns:
        return ()
    tags = invented.offered(block, patterns, *args)
    offered = (*tags.names, *tags.invented)
    outputs = _tags_of_outputs(block, args)
    num_steps = functools.cache(functools.partial(_num_steps, block, args))
    found = []
    for policy in patterns:
        for name in _matching(policy, offered):
            if _is_useful(num_steps, stage, policy.kind, name, offered):
                continue
            found.append(_useless(policy.kind, name, is_output=name in outputs))
    return tuple(found)


def _useless(kind: str, name: str, is_output: bool) -> Finding:
    if is_output:
        message = (
            f"{kind}:{name} does nothing: {name!r} is on the block's output, which the next block "
            "keeps as its input anyway; leave it out, or write offload:carry to move the carries"
        )
        return Finding(code="tag-on-output", message=message)
    message = (
        f"{kind}:{name} spares no recomputation: the backward pass does not ask for {name!r}, or "
        "makes what it is made from anyway; tag what the next operation's derivative reads, such "
        "as the input of a nonlinearity (jaxckpt.explain lists it)"
    )
    return Finding(code="tag-not-needed", message=message)


def _is_useful(num_steps: Callable[[Stage], int], stage: Stage, kind: str, name: str, offered):
    """Whether keeping `name` spares a step, alone or beside all else that the stage keeps."""
    alone = dataclasses.replace(_FULL, policies=(Policy(kind=kind, names=(name,)),))
    if num_steps(alone) < num_steps(_FULL):
        return True
    everything = _exact(stage, offered)
    return num_steps(everything) < num_steps(_exact(stage, offered, without=(kind, name)))


def _exact(stage: Stage, offered, without: tuple[str, str] | None = None) -> Stage:
    """Returns a `full` stage that keeps the same tags, spelled out, but for one of a kind."""
    policies = []
    for policy in stage.inner_policies:
        names = tuple(n for n in _matching(policy, offered) if (policy.kind, n) != without)
        if names or not policy.names:
            policies.append(dataclasses.replace(policy, names=names))
    return dataclasses.replace(_FULL, policies=tuple(policies))


def _matching(policy: Policy, offered: Iterable[str]) -> list[str]:
    return [name for name in offered if any(words.matches(name, p) for p in policy.names)]


def _num_steps(block: Callable, args, stage: Stage) -> int:
    """Returns how many steps a block's forward and backward pass take, views left out."""
    fn = checkpointed(block, stage)

    def both(args, grads):
        out, reverse = jax.vjp(fn, *args)
        return out, reverse(grads)

    grads = jax.eval_shape(fn, *args)
    grads = jax.tree.map(_cotangent, grads)
    flat = flatten(jax.make_jaxpr(both)(args, grads))
    return sum(not (is_identity(step) or is_view(step)) for step in flat.live_steps())


def _cotangent(x):
    if jax.numpy.issubdtype(x.dtype, jax.numpy.inexact):
        return x
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.float0)


def _tags_of_outputs(block: Callable, args) -> set[str]:
    """Returns the tags that stand on what the block returns."""
    flat = flatten(jax.make_jaxpr(block)(*args))
    origins = {origin_of(value) for value in flat.outputs}
    return {
        step.params["name"]
        for step in flat.steps
        if step.name == jaxprs.TAG and origin_of(step.outputs[0]) in origins
    }


def _all_steps(flat: Flat) -> list[Step]:
    inner = [found for step in flat.steps for body in bodies(step) for found in _all_steps(body)]
    return [*flat.steps, *inner]
