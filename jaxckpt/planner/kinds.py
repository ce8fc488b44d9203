"""Kinds, the ways to treat one block: a list of kinds, with the bytes and seconds of each.

A stack is traced under `scan_blocks` with the kind's policies, but never compiled. A block keeps
the leaves of its `jax.vjp`. Its seconds are the roofline of its gradient. The kinds worth mixing
are `none`, `full` and the sets of policies that `inside_block.py` proposes.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence

import jax

from jaxckpt.costs.flat import Flat, Value, flatten
from jaxckpt.costs.flops import count_flops
from jaxckpt.costs.residuals import origin_of
from jaxckpt.costs.roofline import Rates, estimate
from jaxckpt.planner.inside_block import (
    Graph,
    Passes,
    Unit,
    lean_proposals,
    offload_proposals,
    proposals,
)
from jaxckpt.planner.stacks import Stack
from jaxckpt.plans import Plan, PlanError, Policy, Stage
from jaxckpt.transforms import policies, value_names
from jaxckpt.transforms.block_vjp import Moving, differentiate
from jaxckpt.transforms.cuts import Opened
from jaxckpt.transforms.region import run_region
from jaxckpt.transforms.scan import scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to treat a block, `none` or `full` with policies, with the figures of one block.

    Attributes:
      schedule: `"none"` or `"full"`.
      policies: The policies of `full`, which say what is kept.
      kept_bytes: Bytes kept on the device from the forward to the backward pass.
      largest_bytes: Bytes of the largest kept array of one stack.
      shapes: The shapes `[L, ...]` of the arrays that are kept of all blocks of a stack.
      host_bytes: Bytes kept on the host from the forward to the backward pass.
      live_bytes: Bytes of all residuals that the block's reversal holds: recomputed residuals and
        copies of kept residuals.
      gathered_bytes: The part of `live_bytes` that comes from other devices, also for one block.
      params_bytes: Bytes of the block's parameters, and so of the parameters' gradients.
      seconds: Seconds of forward pass, recomputation and backward pass, with transfers to the host.
      flops: FLOPs of matrix products and attention kernels in forward pass, recomputation and
        backward pass.
      device_seconds: If values are moved to the host, `seconds` without transfers; else 0.
    """

    schedule: str
    policies: tuple[Policy, ...] = ()
    kept_bytes: float
    largest_bytes: float = 0.0
    shapes: frozenset[tuple[int, ...]] = frozenset()
    host_bytes: float = 0.0
    live_bytes: float
    gathered_bytes: float = 0.0
    params_bytes: float = 0.0
    seconds: float
    flops: float
    device_seconds: float = 0.0

    def stage(self, count: int | None = None) -> Stage:
        """Returns the stage of `count` blocks of this kind."""
        return Stage(count=count, schedule=self.schedule, policies=self.policies)

    def __str__(self) -> str:
        return str(self.stage())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """The seconds and FLOPs of one forward run of a block that keeps nothing."""

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
    """Returns the kind of a stage, with the figures of one block of every stack together.

    Args:
      stacks: Stacks with the same number of blocks.
      stage: `none`, or `full` with policies; its count is not read.
      rates: The rates of the chip.
      residual_bytes: The bytes that one block keeps under `none`; None if `stage` is `none`.
    """
    kept = largest = host = seconds = flops = 0.0
    shapes = set()
    for stack in stacks:
        jaxpr, num_kept = _gradient(stack, stage)
        arrays, on_host = _kept(flatten(jaxpr), num_kept)
        on_device = [value.nbytes for value in arrays]
        if stack.num_blocks > 1:
            found = {tuple(value.aval.shape) for value in arrays}
            shapes |= {shape for shape in found if shape[:1] == (stack.num_blocks,)}
        kept += sum(on_device) / stack.num_blocks
        largest = max(largest, max(on_device, default=0) / stack.num_blocks)
        host += sum(on_host) / stack.num_blocks
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
        largest_bytes=largest,
        shapes=frozenset(shapes),
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
    """Returns the seconds of two passes that move bytes to the host and back.

    Args:
      forward_seconds: The seconds of the forward pass without transfers.
      backward_seconds: The seconds of the backward pass without transfers.
      moved_bytes: The bytes in each direction.
      rates: The rates of the chip.
    """
    passes = (forward_seconds, backward_seconds)
    return sum(rates.host_link.seconds(work, moved_bytes) for work in passes)


def _run(stack: Stack, stage: Stage, carry, params, consts, unroll: int = 1):
    plan = Plan(stages=(dataclasses.replace(stage, count=None),))
    if stack.region is not None:
        return run_region(stack.region, _plan_of_ends(stack, stage) if stack.ends else plan, carry)
    num_carry = len(stack.carry)

    def step(carry, params_i):
        out = stack.call(carry, params_i, consts)
        return out[:num_carry], out[num_carry:]

    carry, ys = scan(step, carry, params, stack.num_blocks, unroll=unroll, remat=plan)
    return [*carry, *ys]


def _plan_of_ends(stack: Stack, stage: Stage) -> Plan:
    """Returns the plan of a chain's function that treats every block of the chain by one stage."""
    assert stack.region is not None
    sizes = (stop - start for start, stop in itertools.pairwise(stack.ends) if stop > start)
    stages = tuple(dataclasses.replace(stage, count=size) for size in sizes)
    return Plan(stages=stages, graph=Opened.of(stack.region.jaxpr).graph)


def _unroll(stack: Stack, stage: Stage) -> int:
    """Returns how many blocks to unroll in a trip of the traced loop.

    A loop copies kept values in and out, but unrolled blocks do not. Kinds that move values to the
    host are always costed in a loop.
    """
    is_moving = any(policy.kind == "offload" for policy in stage.policies)
    return 1 if is_moving else stack.unroll


def _gradient(stack: Stack, stage: Stage):
    """Returns the jaxpr of a stack's gradient and residuals, and the number of residuals.

    The residuals are the jaxpr's last outputs. Outputs cost nothing, so one trace is enough for
    both bytes and seconds.
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


def _kept(flat: Flat, count: int) -> tuple[list[Value], list[int]]:
    """Returns the device values and host bytes of the last `count` outputs, except inputs."""
    device, host = [], []
    for value in dict.fromkeys(flat.outputs[len(flat.outputs) - count :]):
        origin = origin_of(value)
        if origin in flat.inputs or origin in flat.constants or origin.constant is not None:
            continue
        if getattr(value.aval, "memory_space", None) == jax.memory.Space.Host:
            host.append(value.nbytes)
        else:
            device.append(value)
    return device, host


# The plans that a user would try first. A block without an attention kernel refuses `attention`.
PLAIN = ("none", "full", "dots", "dots_no_batch", "attention")
# Keeping more must save this share of a block's time. A smaller share is below the model's
# precision.
_LEAST_GAIN = 0.001
_LOG = logging.getLogger(__name__)


_LEAST_AGAIN = 0.005


def plain_kinds(
    stacks: Sequence[Stack],
    rates: Rates,
    forward: Forward,
    *,
    kept_bytes: float,
    live_bytes: float,
    part_bytes: float,
    has_kernel: bool,
) -> tuple[tuple[Kind, ...], float]:
    """Returns the kinds that a user would try first, of functions under `checkpoint` or of chains.

    Args:
      stacks: The functions or chains.
      rates: The rates of the chip.
      forward: The cost of one forward run of a block of each stack.
      kept_bytes: Bytes that XLA holds of one block of each stack if nothing is recomputed.
      live_bytes: Bytes that a reversal holds if everything is recomputed.
      part_bytes: Bytes that a reversal holds if hardly anything is recomputed.
      has_kernel: Whether a stack runs an attention kernel.

    Returns:
      The kinds, and the bytes that JAX keeps of one block of each stack under `none`.
    """
    none = kind_cost(stacks, Stage(schedule="none"), rates)
    found = []
    for text in ("full", "dots", *["attention"] * has_kernel):  # each trace takes seconds
        found += _costed(stacks, Plan.parse(text).stages[0], rates, none)
    full = found[0]
    # As JAX traces it, `none` writes and reads every residual. XLA holds fewer residuals, so `none`
    # is not slower than `full` without its second forward pass.
    least, most_bytes = full.seconds - forward.seconds, none.kept_bytes
    none = dataclasses.replace(
        none,
        kept_bytes=min(kept_bytes, none.kept_bytes),
        live_bytes=0.0,
        seconds=min(none.seconds, max(least, none.seconds / 2)),
    )

    def live(kind: Kind) -> float:
        again = (kind.seconds - none.seconds) / max(full.seconds - none.seconds, 1e-30)
        share = min(max(again, 0.0), 1.0)
        return share * live_bytes + (1 - share) * part_bytes

    # Recomputation takes time even if the roofline sees no difference, so `none` comes first.
    least = none.seconds * (1 + _LEAST_AGAIN)
    sizes = [live_bytes, *map(live, found[1:])]
    others = (
        dataclasses.replace(kind, live_bytes=size, seconds=max(kind.seconds, least))
        for kind, size in zip(found, sizes, strict=True)
    )
    return (none, *others), most_bytes


def find_kinds(
    stacks: Sequence[Stack], rates: Rates, host_bytes: float = 0.0
) -> tuple[tuple[Kind, ...], tuple[Kind, ...]]:
    """Returns the kinds that are worth mixing, and the plain kinds.

    Args:
      stacks: The stacks that follow one plan.
      rates: The rates of the chip.
      host_bytes: The most bytes that all blocks together may keep on the host.

    Returns:
      `(kinds, plain)`. A user could write plain kinds by hand: `PLAIN` and `lean_proposals`.
    """
    none = kind_cost(stacks, Stage(schedule="none"), rates)
    plain = [none, kind_cost(stacks, Stage(schedule="full"), rates, none.kept_bytes)]
    for text in PLAIN[2:]:
        plain += _costed(stacks, Plan.parse(text).stages[0], rates, none)
    graphs = [Graph.of(stack, rates) for stack in stacks]
    if len(stacks) > 1:
        graphs = _shared(graphs, stacks)
    graphs = [_keepable(graph, stacks, rates, none) for graph in graphs]
    seen = {kind.policies for kind in plain}

    def costed(*proposed: Iterable[tuple[Policy, ...]]) -> Iterator[Kind]:
        for found in itertools.chain(*proposed):
            stage = Stage(schedule="full", policies=found)
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
    """Yields policies that move values to the host, for `host_bytes` and for unlimited bytes."""
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


def _shared(graphs: Sequence[Graph], stacks: Sequence[Stack]) -> list[Graph]:
    """Returns graphs with only the values whose names the blocks of every stack have.

    The stacks follow one plan. Reading the names of each stack once is cheaper than trying a plan
    for each value.
    """
    asked = [unit.policy for graph in graphs for unit in graph.units]
    offered = [
        value_names.offered(stack.call, asked, stack.carry, stack.params_i, stack.consts)
        for stack in stacks
    ]

    def is_everywhere(unit: Unit) -> bool:
        try:
            for found in offered:
                policies.check((unit.policy,), found)
        except PlanError:
            return False
        return True

    keep = lambda graph: tuple(filter(is_everywhere, graph.units))
    return [dataclasses.replace(graph, units=keep(graph)) for graph in graphs]


def _keepable(graph: Graph, stacks: Sequence[Stack], rates: Rates, none: Kind) -> Graph:
    """Returns a graph without the values whose policy makes a block fail."""
    stage = lambda *units: Stage(schedule="full", policies=tuple(unit.policy for unit in units))
    if not graph.units or _costed(stacks, stage(*graph.units), rates, none):
        return graph
    units = (unit for unit in graph.units if _costed(stacks, stage(unit), rates, none))
    return dataclasses.replace(graph, units=tuple(units))


def _costed(stacks: Sequence[Stack], stage: Stage, rates: Rates, none: Kind) -> list[Kind]:
    """Returns a list with the kind of a stage; an empty list if a stack fails under the stage."""
    try:
        return [kind_cost(stacks, stage, rates, none.kept_bytes)]
    except Exception as error:  # a user's block, or JAX under its policy, may raise anything
        if not isinstance(error, PlanError):
            _LOG.debug("%s is not proposed: no block runs under it", stage, exc_info=True)
        return []


def _gain(less: Kind, more: Kind) -> float:
    return _LEAST_GAIN if less.kept_bytes < more.kept_bytes else 0.0


def _frontier(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """Returns the kinds that no kind beats in bytes, seconds and FLOPs, and `none` and `full`."""
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
