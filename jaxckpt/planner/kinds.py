"""The ways to treat a block that the planner mixes: plain ones, and those of the frontier."""

from collections.abc import Iterator, Sequence

from jaxckpt.memory.roofline import Rates
from jaxckpt.planner.costs import Kind, kind_cost
from jaxckpt.planner.frontier import Graph, proposals
from jaxckpt.planner.stacks import Stack
from jaxckpt.plans import Plan, PlanError, Policy, Stage

# What a user would try first. A block without an attention kernel refuses the last.
PLAIN = ("none", "full", "dots", "dots_no_batch", "attention")
# Keeping more has to spare this share of a block's time; less the model cannot tell.
_LEAST_GAIN = 0.001


def find_kinds(stacks: Sequence[Stack], rates: Rates) -> tuple[tuple[Kind, ...], tuple[Kind, ...]]:
    """Returns the kinds worth mixing, and the plain ones.

    Args:
      stacks: Those that share the plan.
      rates: The chip's.
    """
    none = kind_cost(stacks, Stage(schedule="none"), rates)
    plain = [none]
    for text in PLAIN[1:]:
        plain += _costed(stacks, Plan.parse(text).stages[0], rates, none)
    found = list(plain)
    seen = {kind.policies for kind in found}
    for policies in _proposed(stacks, rates):
        stage = Stage(schedule="full", policies=policies)
        if stage.policies not in seen:
            seen.add(stage.policies)
            found += _costed(stacks, stage, rates, none)
    return _frontier(found), tuple(plain)


def _proposed(stacks: Sequence[Stack], rates: Rates) -> Iterator[tuple[Policy, ...]]:
    for stack in stacks:
        yield from proposals(Graph.of(stack, rates))


def _costed(stacks: Sequence[Stack], stage: Stage, rates: Rates, none: Kind) -> list[Kind]:
    """Returns the kind of a stage, or nothing where some stack's block refuses it."""
    try:
        return [kind_cost(stacks, stage, rates, none.kept_bytes)]
    except PlanError:
        return []


def _gain(less: Kind, more: Kind) -> float:
    return _LEAST_GAIN if less.kept_bytes < more.kept_bytes else 0.0


def _frontier(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """Drops kinds that another beats in bytes, seconds and FLOPs; `none` and `full` stay."""
    kept = []
    for kind in kinds:
        beaten = any(
            other is not kind
            and other.kept_bytes <= kind.kept_bytes
            and other.seconds <= kind.seconds * (1 + _gain(other, kind))
            and other.flops <= kind.flops
            and (other.kept_bytes, other.seconds, other.flops)
            != (kind.kept_bytes, kind.seconds, kind.flops)
            for other in kinds
        )
        if not beaten or not kind.policies:
            kept.append(kind)
    return tuple(kept)
