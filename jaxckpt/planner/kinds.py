"""The ways to treat a block that the planner mixes: plain ones, and those of the frontier.

What one block of a stack keeps and costs under a policy, as JAX's own transforms say.

The stack is traced under `scan_blocks` with the policy, never compiled: the leaves of its
`jax.vjp` are what it keeps, and the roofline of its gradient is what it takes. Nothing is said
about which policy to use; `inside_block.py` proposes.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence

import jax

from jaxckpt.costs.flat import Flat, flatten
from jaxckpt.costs.flops import count_flops
from jaxckpt.costs.residuals import origin_of
from jaxckpt.costs.roofline import Rates, estimate
from jaxckpt.planner.inside_block import Graph, Passes, lean_proposals, offload_proposals, proposals
from jaxckpt.planner.stacks import Stack
from jaxckpt.plans import Plan, PlanError, Policy, Stage
from jaxckpt.transforms.block_vjp import Moving, differentiate
from jaxckpt.transforms.scan import scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to treat a block: `none`, or `full` with policies; all figures are of one block.

    Attributes:
      schedule: `"none"` or `"full"`.
      policies: What `full` keeps.
      kept_bytes: On the device from the forward to the backward pass.
      host_bytes: On the host meanwhile; moved out and back beside the computation.
      live_bytes: What its reversal holds while it runs: all residuals of the block, those made
        again and copies of those kept.
      params_bytes: Its parameters, and so their gradients.
      seconds: Forward, recomputation and backward.
      flops: Of the same, matrix products and attention kernels.
      device_seconds: Where something is moved to the host, the same without the link.
    """

    schedule: str
    policies: tuple[Policy, ...] = ()
    kept_bytes: float
    host_bytes: float = 0.0
    live_bytes: float
    params_bytes: float = 0.0
    seconds: float
    flops: float
    device_seconds: float = 0.0

    def stage(self, count: int | None = None) -> Stage:
        """Returns the stage of `count` such blocks."""
        return Stage(count=count, schedule=self.schedule, policies=self.policies)

    def __str__(self) -> str:
        return str(self.stage())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """One run of a block forward that keeps nothing."""

    seconds: float
    flops: float


def forward_cost(stacks: Sequence[Stack], rates: Rates) -> Forward:
    """Returns the cost of running one block of every stack forward."""
    seconds = flops = 0.0
    for stack in stacks:
        run = lambda *groups, stack=stack: _run(stack, Stage(schedule="full"), *groups)
        jaxpr = jax.make_jaxpr(run)(stack.carry, stack.params, stack.consts)
        seconds += estimate(jaxpr, rates).seconds / stack.num_blocks
        flops += count_flops(jaxpr) / stack.num_blocks
    return Forward(seconds=seconds, flops=flops)


def kind_cost(stacks: Sequence[Stack], stage: Stage, rates: Rates, residual_bytes=None) -> Kind:
    """Returns what a policy keeps and costs, one block of every stack together.

    Args:
      stacks: Stacks of one number of blocks.
      stage: `none`, or `full` with policies; its count is not read.
      rates: The chip's.
      residual_bytes: What `none` keeps of one block; None for `none` itself.
    """
    kept = host = seconds = flops = 0.0
    for stack in stacks:
        jaxpr, num_kept = _gradient(stack, stage)
        on_device, on_host = _kept(flatten(jaxpr), num_kept)
        kept += on_device / stack.num_blocks
        host += on_host / stack.num_blocks
        cost = estimate(jaxpr, rates)
        seconds += (cost.matmul_seconds + cost.memory_seconds) / stack.num_blocks
        flops += count_flops(jaxpr) / stack.num_blocks
    device_seconds = seconds if host else 0.0
    if host:
        forward = forward_cost(stacks, rates).seconds
        seconds = with_copies(forward, seconds - forward, host, rates)
    return Kind(
        schedule=stage.schedule,
        policies=stage.policies,
        kept_bytes=kept,
        host_bytes=host,
        live_bytes=kept if residual_bytes is None else residual_bytes,
        params_bytes=sum(stack.params_bytes / stack.num_blocks for stack in stacks),
        seconds=seconds,
        flops=flops,
        device_seconds=device_seconds,
    )


def with_copies(
    forward_seconds: float, backward_seconds: float, moved_bytes: float, rates: Rates
) -> float:
    """Returns what two passes take that move bytes to the host and back.

    Args:
      forward_seconds: While bytes go out.
      backward_seconds: While they come back.
      moved_bytes: In each direction.
      rates: The chip's.
    """
    passes = (forward_seconds, backward_seconds)
    return sum(rates.host_link.seconds(work, moved_bytes) for work in passes)


def _run(stack: Stack, stage: Stage, carry, params, consts, unroll: int = 1):
    plan = Plan(stages=(dataclasses.replace(stage, count=None),))
    num_carry = len(stack.carry)

    def step(carry, params_i):
        out = stack.call(carry, params_i, consts)
        return out[:num_carry], out[num_carry:]

    carry, ys = scan(step, carry, params, stack.num_blocks, unroll=unroll, remat=plan)
    return [*carry, *ys]


def _unroll(stack: Stack, stage: Stage) -> int:
    """Returns the blocks of a trip: a loop copies what it keeps in and out, unrolled blocks do not.

    What is moved to the host is costed in a loop.
    """
    is_moving = any(policy.kind == "offload" for policy in stage.policies)
    return 1 if is_moving else stack.unroll


def _gradient(stack: Stack, stage: Stage):
    """Returns the jaxpr of a stack's gradient, whose last outputs are the residuals; their number.

    One trace serves both: what is kept is read from its outputs, and outputs cost nothing.
    """
    count = []

    def gradient(carry, params, consts):
        unroll = _unroll(stack, stage)
        run = lambda carry, params, consts: _run(stack, stage, carry, params, consts, unroll)
        out, reverse = differentiate(run, carry, params, consts, Moving.all_of(params, consts))
        leaves = jax.tree.leaves(reverse)
        count.append(len(leaves))
        moving = [x for x in out if jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)]
        return [*reverse(moving), *out], leaves

    jaxpr = jax.make_jaxpr(gradient)(stack.carry, stack.params, stack.consts)
    return jaxpr, count[-1]


def _kept(flat: Flat, count: int) -> tuple[int, int]:
    """Returns the bytes of the last `count` outputs that no input holds: device and host."""
    device = host = 0
    for value in dict.fromkeys(flat.outputs[len(flat.outputs) - count :]):
        origin = origin_of(value)
        if origin in flat.inputs or origin in flat.constants or origin.constant is not None:
            continue
        if getattr(value.aval, "memory_space", None) == jax.memory.Space.Host:
            host += value.nbytes
        else:
            device += value.nbytes
    return device, host


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
      `(kinds, plain)`: plain are those that a user could name, `PLAIN` and `lean_proposals`.
    """
    none = kind_cost(stacks, Stage(schedule="none"), rates)
    plain = [none, kind_cost(stacks, Stage(schedule="full"), rates, none.kept_bytes)]
    for text in PLAIN[2:]:
        plain += _costed(stacks, Plan.parse(text).stages[0], rates, none)
    graphs = [_keepable(Graph.of(stack, rates), stacks, rates, none) for stack in stacks]
    seen = {kind.policies for kind in plain}

    def costed(*proposed: Iterable[tuple[Policy, ...]]) -> Iterator[Kind]:
        for policies in itertools.chain(*proposed):
            stage = Stage(schedule="full", policies=policies)
            if stage.policies not in seen:
                seen.add(stage.policies)
                yield from _costed(stacks, stage, rates, none)

    plain += costed(*(lean_proposals(graph, rates) for graph in graphs))
    moving = _moving(stacks, graphs, rates, none, host_bytes) if host_bytes else ()
    others = costed(*map(proposals, graphs), moving)
    return _frontier([*plain, *others]), tuple(plain)


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
