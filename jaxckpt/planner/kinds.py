"""The ways to treat a block that the planner mixes: plain ones, and those of the frontier."""

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Sequence

from jaxckpt.memory.roofline import Rates
from jaxckpt.planner.costs import Kind, forward_cost, kind_cost
from jaxckpt.planner.frontier import Graph, proposals
from jaxckpt.planner.lean import lean_proposals
from jaxckpt.planner.offloads import Passes, offload_proposals
from jaxckpt.planner.stacks import Stack
from jaxckpt.plans import Plan, PlanError, Policy, Stage

# What a user would try first. A block without an attention kernel refuses the last.
PLAIN = ("none", "full", "dots", "dots_no_batch", "attention")
# Keeping more has to spare this share of a block's time; less the model cannot tell.
_LEAST_GAIN = 0.001
_LOG = logging.getLogger(__name__)


def find_kinds(
    stacks: Sequence[Stack], rates: Rates, host_bytes: float = 0.0
) -> tuple[tuple[Kind, ...], tuple[Kind, ...]]:
    """Returns the kinds worth mixing, and the plain ones.

    Args:
      stacks: Those that share the plan.
      rates: The chip's.
      host_bytes: What all blocks together may have on the host; 0 for nothing.

    Returns:
      `(kinds, plain)`: plain are those that a user could name, `PLAIN` and those of `lean.py`.
    """
    none = kind_cost(stacks, Stage(schedule="none"), rates)
    plain = [none, kind_cost(stacks, Stage(schedule="full"), rates, none.kept_bytes)]
    for text in PLAIN[2:]:
        plain += _costed(stacks, Plan.parse(text).stages[0], rates, none)
    graphs = [_keepable(Graph.of(stack, rates), stacks, rates, none) for stack in stacks]
    seen = {kind.policies for kind in plain}
    for graph in graphs:
        for policies in lean_proposals(graph, rates):
            stage = Stage(schedule="full", policies=policies)
            if stage.policies not in seen:
                seen.add(stage.policies)
                plain += _costed(stacks, stage, rates, none)
    found = list(plain)
    moving = _moving(stacks, graphs, rates, none, host_bytes) if host_bytes else ()
    for policies in itertools.chain(*map(proposals, graphs), moving):
        stage = Stage(schedule="full", policies=policies)
        if stage.policies not in seen:
            seen.add(stage.policies)
            found += _costed(stacks, stage, rates, none)
    return _frontier(found), tuple(plain)


def _moving(
    stacks: Sequence[Stack],
    graphs: Sequence[Graph],
    rates: Rates,
    none: Kind,
    host_bytes: float,
) -> Iterator[tuple[Policy, ...]]:
    """Yields policies that move something to the host, within what may be there and without end."""
    forward = forward_cost(stacks, rates).seconds
    passes = Passes(
        forward_seconds=forward,
        backward_seconds=max(none.seconds - forward, 0.0),
        carry_bytes=sum(stack.carry_bytes for stack in stacks),
        link=rates.host_link,
    )
    for stack, graph in zip(stacks, graphs, strict=True):
        for most in (math.inf, host_bytes / stack.num_blocks):
            yield from offload_proposals(graph, passes, most)


def _keepable(graph: Graph, stacks: Sequence[Stack], rates: Rates, none: Kind) -> Graph:
    """Returns a graph without the values that cannot be kept, such as complex ones under JAX."""
    stage = lambda *units: Stage(schedule="full", policies=tuple(unit.policy for unit in units))
    if not graph.units or _costed(stacks, stage(*graph.units), rates, none):
        return graph
    units = (unit for unit in graph.units if _costed(stacks, stage(unit), rates, none))
    return dataclasses.replace(graph, units=tuple(units))


def _costed(stacks: Sequence[Stack], stage: Stage, rates: Rates, none: Kind) -> list[Kind]:
    """Returns the kind of a stage, or nothing where some stack does not run under it."""
    try:
        return [kind_cost(stacks, stage, rates, none.kept_bytes)]
    except Exception as error:  # a user's block, or JAX under its policy, may raise anything
        if not isinstance(error, PlanError):
            _LOG.debug("%s is not proposed: no block runs under it", stage, exc_info=True)
        return []


def _gain(less: Kind, more: Kind) -> float:
    return _LEAST_GAIN if less.kept_bytes < more.kept_bytes else 0.0


def _frontier(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """Drops kinds that another beats in all bytes, seconds and FLOPs; `none` and `full` stay."""
    kept = []
    for kind in kinds:
        beaten = any(
            other is not kind
            and other.kept_bytes <= kind.kept_bytes
            and other.host_bytes <= kind.host_bytes
            and other.seconds <= kind.seconds * (1 + _gain(other, kind))
            and other.flops <= kind.flops
            and (other.kept_bytes, other.host_bytes, other.seconds, other.flops)
            != (kind.kept_bytes, kind.host_bytes, kind.seconds, kind.flops)
            for other in kinds
        )
        if not beaten or not kind.policies:
            kept.append(kind)
    return tuple(kept)
