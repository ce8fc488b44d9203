"""Layers of several kinds, one after another, under a plan that counts layers.

    carry, ys = run_mixed(steps, carry, rows, each, order, remat="sqrt")

`order[i]` is the kind of layer i, such as `(0, 0, 0, 0, 0, 1) * 4 + (0, 0)`.

Under `none`, `full` and policies, a loop runs one period in each trip. Every layer of the period is
a separate checkpointed block, so one layer's residuals are live at a time. Consecutive equal layers
form an inner loop. Layers before and after the periods are not in the loop. Under a schedule, the
executor's loops run one layer in each trip, and `lax.switch` chooses the layer's kind. So the
program grows with the period or the number of kinds, but not with the number of layers.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt.plans import Plan
from jaxckpt.schedules.of_stage import under_loss
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.transforms import checkpointed, observers, stack_executor, value_names
from jaxckpt.transforms.chain import tags_of
from jaxckpt.transforms.checks import (
    check_carry,
    check_pair,
    check_policies,
    check_rerun,
    check_schedule,
)
from jaxckpt.transforms.policies import GivenPolicy, all_of, plan_and_policy
from jaxckpt.transforms.scan import as_returned
from jaxckpt.transforms.stack_blocks import How, Places
from jaxckpt.transforms.traced_block import (
    TracedBlock,
    all_blocks,
    as_arrays,
    first_block,
    identity,
    once_compiled,
    trace_block,
    zeros,
)


def run_mixed(
    steps: Sequence[Callable],
    carry,
    rows: Sequence[Any],
    each,
    order: Sequence[int],
    *,
    remat: str | Plan | Schedule | Callable,
    unroll: int,
) -> tuple[Any, list]:
    """Runs layers of several kinds, one after another.

    Args:
      steps: For each kind, `step(carry, row, each_i) -> (carry, y)`.
      carry: The first layer's input.
      rows: A pytree of arrays for each layer, with one structure and equal shapes within a kind.
      each: Keyword arguments that differ from layer to layer, `[L, ...]`.
      order: The kind of each layer.
      remat: A plan or its text, a schedule for L layers, or a policy of `jax.checkpoint`.
      unroll: The number of layers unrolled in one trip of a loop.

    Returns:
      The last layer's carry, and for each kind the ys of its layers, stacked.
    """
    rows, each, carry = as_arrays((list(rows), each, carry))
    remat, given = (remat, None) if isinstance(remat, Schedule) else plan_and_policy(remat)
    if isinstance(remat, Schedule):
        check_schedule(remat, len(order), nested=False)
        plan = remat
    else:
        plan = remat.bind(len(order))
    one_each = first_block(each)

    def trace(carry):
        applied = [lambda carry, item, step=step: step(carry, *item) for step in steps]
        firsts = [rows[order.index(kind)] for kind in range(len(steps))]
        return [
            trace_block(apply, carry, (first, one_each))
            for apply, first in zip(applied, firsts, strict=True)
        ]

    traced = trace(carry)
    for one, _ in traced:
        check_pair(one.out)
    carry, is_cast = as_returned(carry, traced[0][0].out[0])
    if is_cast:
        traced = trace(carry)
    blocks, consts = [one for one, _ in traced], [consts for _, consts in traced]
    for kind, one in enumerate(blocks):
        check_carry(carry, one.out[0], f"layers[{order.index(kind)}]")
        check_rerun(one, remat, given)
    if isinstance(remat, Plan):
        check_policies(remat, lambda asked: tags_of(blocks, asked))
    # As in `scan.looped`, leaves that no layer changes are kept once, and not with every carry.
    leaves, tree = jax.tree.flatten(carry)
    places = sorted({place for one in blocks for place in one.changed})
    held = [leaf for place, leaf in enumerate(leaves) if place not in places]
    alone = tuple(one.only_changed(places) for one in blocks)
    # The planner costs one block, and corrects its costs by compiled steps. A kind with a single
    # layer says little about the other layers.
    repeated = [one for kind, one in enumerate(alone) if order.count(kind) > 1]
    heaviest = max(repeated or alone, key=_size)
    call = observers.StackCall(
        block=heaviest,
        params=all_blocks(heaviest.inputs[1], len(order)),
        carry=[leaves[place] for place in places],
        remat=given or remat,
        num_blocks=len(order),
        unroll=unroll,
    )
    changed = observers.tell(call)
    static = (alone, tuple(order), plan, given, unroll)
    program = once_compiled(_run, tuple(map(identity, steps)), *static)
    items = [jax.tree.leaves(row) for row in rows], jax.tree.leaves(each)
    made, ys = program(*items, changed, [[*one, *held] for one in consts])
    made = iter(made)
    leaves = [next(made) if place in places else x for place, x in enumerate(leaves)]
    trees = [jax.tree.structure(one.out[1]) for one in blocks]
    return jax.tree.unflatten(tree, leaves), list(map(jax.tree.unflatten, trees, ys))


def _size(block: TracedBlock) -> int:
    """Returns the number of elements of all values that a block computes."""
    return sum(var.aval.size for one in block.jaxpr.eqns for var in one.outvars)


def loops_of(order: Sequence[int], unroll: int = 1) -> list[tuple[int, int, int]]:
    """Returns loops that run all layers in order: `(first layer, layers in a trip, trips)`.

    The loops are chosen so that the fewest layers are traced. Layers in a loop of one trip run
    without a loop.

    Args:
      order: The kind of each layer.
      unroll: The number of layers unrolled in one trip. A trip has at least one whole period.
    """

    def cut(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        best = (stop - start, start, stop - start, 1)
        for period in range(1, (stop - start) // 2 + 1):
            same = [order[i] == order[i + period] for i in range(start, stop - period)]
            first = start
            for is_same, run in itertools.groupby(same):
                length = len(list(run))
                trips = (length + period) // period
                if is_same and trips > 1:
                    traced = stop - start - period * (trips - 1)
                    best = min(best, (traced, first, period, trips))
                first += length
        _, first, period, trips = best
        if trips == 1:
            if stop > start:
                yield start, stop - start, 1
            return
        yield from cut(start, first)
        at_once = max(1, min(unroll // period, trips))
        yield first, period * at_once, trips // at_once
        done = first + period * at_once * (trips // at_once)
        if done < first + period * trips:
            yield done, first + period * trips - done, 1
        yield from cut(first + period * trips, stop)

    return list(cut(0, len(order)))


def _run(
    blocks: Sequence[TracedBlock],
    order: Sequence[int],
    plan: Plan | Schedule,
    given: GivenPolicy | None,
    unroll: int,
    rows: list[list],
    each: list,
    carry: list,
    consts: list[list],
) -> tuple[list, list]:
    """Returns the last carry, and each kind's ys, as lists of leaves."""
    policies = () if isinstance(plan, Schedule) else all_of(plan)
    stack = _Layers(
        calls=[value_names.resolved(block.call, policies) for block in blocks],
        types=[block.ys for block in blocks],
        order=order,
        rows=rows,
        each=each,
        consts=consts,
    )
    if isinstance(plan, Schedule):
        return stack.scheduled(carry, range(len(order)), under_loss(plan), How(unroll=unroll))
    made, start = [], 0
    for stage in plan.stages:
        layers = range(start, start + stage.bound_count)
        if stack_executor.runs(stage):
            carry, ys = stack.scheduled(carry, layers, stage, How(unroll=unroll))
        else:
            remat = checkpointed.remat_of(stage, given)
            carry, ys = stack.looped(carry, layers, remat, unroll)
        made.append(ys)
        start = layers.stop
    return carry, _joined(made)


def _joined(parts: Sequence[list]) -> list:
    """Returns each kind's ys of all parts, concatenated; None for a kind without layers."""

    def join(found: list):
        if len(found) < 2:
            return found[0] if found else None
        return [jnp.concatenate(leaves) for leaves in zip(*found, strict=True)]

    parts_of = zip(*parts, strict=True)
    return [join([ys for ys in of_kind if ys is not None]) for of_kind in parts_of]


class _Layers:
    """The layers of one call; a method runs a range of these layers."""

    def __init__(self, *, calls, types, order, rows, each, consts):
        self.calls, self.types, self.order = calls, types, order
        self.rows, self.each, self.consts = rows, each, consts

    def looped(self, carry: list, layers: range, remat, unroll: int) -> tuple[list, list]:
        """Runs layers in loops over their periods, each layer under `remat` if it is not None."""
        order, made = self.order[layers.start : layers.stop], []
        for first, period, trips in loops_of(order, unroll):
            first += layers.start
            carry, ys = self._loop(carry, first, period, trips, remat, in_row=unroll == 1)
            made.append(ys)
        return carry, _joined(made)

    def _loop(
        self, carry, first: int, period: int, trips: int, remat, *, in_row: bool
    ) -> tuple[list, list]:
        kinds = self.order[first : first + period]
        # Consecutive layers of one kind form an inner loop, which separates each layer's
        # recomputation without barriers. Without recomputation, the inner loop would only copy
        # residuals one more time.
        sizes = [len(list(run)) for _, run in itertools.groupby(kinds)]
        sizes = sizes if in_row and remat is not None else [1] * period
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        items = [
            self._stacked(range(first, first + period * trips), start, size, period)
            for start, size in zip(starts, sizes, strict=True)
        ]

        def run_of(start: int, size: int) -> Callable:
            kind = kinds[start]

            def apply(carry, item):
                out = self.calls[kind](carry, [*item[0], *item[1]], self.consts[kind])
                return out[: len(carry)], out[len(carry) :]

            # XLA unrolls a loop of one trip, so recomputation there needs a barrier.
            alone = size == 1 and (period > 1 or trips == 1)
            one = apply if remat is None else remat(apply, prevent_cse=alone)
            if size > 1:
                return lambda carry, items: lax.scan(one, carry, items, size)

            def only(carry, items):
                carry, ys = one(carry, jax.tree.map(lambda x: x[0], items))
                return carry, [y[None] for y in ys]

            return only

        runs = [run_of(start, size) for start, size in zip(starts, sizes, strict=True)]

        def body(carry, items):
            made = []
            for run, item in zip(runs, items, strict=True):
                carry, ys = run(carry, item)
                made.append(ys)
            return carry, made

        carry, made = lax.scan(body, carry, items, trips)
        ys: list = [None] * len(self.calls)
        for kind in set(kinds):
            mine = [ys for ys, start in zip(made, starts, strict=True) if kinds[start] == kind]
            merge = lambda *runs: jnp.concatenate(runs, 1).reshape(-1, *runs[0].shape[2:])
            ys[kind] = list(map(merge, *mine))
        return carry, ys

    def _stacked(self, layers: range, start: int, size: int, period: int) -> tuple[list, list]:
        """Returns rows and `each` of some layers of each period, `[trips, size, ...]`.

        Args:
          layers: The layers of all periods.
          start: The place in the period of the first layer to return.
          size: The number of layers to return in each period; all are of one kind.
          period: The number of all layers in a period.
        """
        mine = [i for i in layers if start <= (i - layers.start) % period < start + size]
        rows = [x.reshape(-1, size, *x.shape[1:]) for x in self._stacked_rows(mine)]
        each = [x[layers.start : layers.stop] for x in self.each]
        each = [x.reshape(-1, period, *x.shape[1:])[:, start : start + size] for x in each]
        return rows, each

    def _stacked_rows(self, layers: Sequence[int]) -> list:
        return [jnp.stack(leaves) for leaves in zip(*(self.rows[i] for i in layers), strict=True)]

    def scheduled(self, carry: list, layers: range, stage, how: How) -> tuple[list, list]:
        """Runs layers by the executor.

        Args:
          carry: The first layer's input.
          layers: The layers.
          stage: A bound stage, or a schedule.
          how: The options of a schedule's run; a stage only uses the option `unroll`.
        """
        order = self.order[layers.start : layers.stop]
        kinds = sorted(set(order))
        stacks = [
            self._stacked_rows([i for i in layers if self.order[i] == kind]) for kind in kinds
        ]
        rows_of = [
            tuple(order[:i].count(kind) if one == kind else -1 for i, one in enumerate(order))
            for kind in kinds
        ]
        which = jnp.asarray([kinds.index(kind) for kind in order], jnp.int32)
        each = [x[layers.start : layers.stop] for x in self.each]
        params = [which, *each, *itertools.chain(*stacks)]
        # A const that several kinds read is passed once.
        unique = {id(x): x for kind in kinds for x in self.consts[kind]}
        reads = [[list(unique).index(id(x)) for x in self.consts[kind]] for kind in kinds]
        lead, counts = 1 + len(each), list(map(len, stacks))
        types = [self.types[kind] for kind in kinds]

        def branch(place: int) -> Callable:
            start = lead + sum(counts[:place])

            def run(carry, params_i, consts):
                item = [*params_i[start : start + counts[place]], *params_i[1:lead]]
                mine = [consts[i] for i in reads[place]]
                out = self.calls[kinds[place]](carry, item, mine)
                ys = [[zeros(1, aval)[0] for aval in avals] for avals in types]
                ys[place] = out[len(carry) :]
                return [*out[: len(carry)], *itertools.chain(*ys)]

            return run

        branches = [branch(place) for place in range(len(kinds))]
        places = Places(
            kinds=tuple(branches),
            params=(None,) * lead + _repeated(rows_of, counts),
            ys=_repeated(rows_of, list(map(len, types))),
        )

        def call(carry, params_i, consts):
            return lax.switch(params_i[0], branches, carry, params_i, consts)

        args = (call, params, carry, list(unique.values()))
        if isinstance(stage, Schedule):
            out = stack_executor.run_schedule(*args, stage, how, places)
        else:
            out = stack_executor.run_stage(*args, stage, unroll=how.unroll, places=places)
        rest, ys = iter(out[len(carry) :]), [None] * len(self.calls)
        for kind, avals in zip(kinds, types, strict=True):
            ys[kind] = list(itertools.islice(rest, len(avals)))
        return out[: len(carry)], ys


def _repeated(rows_of: Sequence[tuple], counts: Sequence[int]) -> tuple:
    pairs = zip(rows_of, counts, strict=True)
    return tuple(itertools.chain(*((rows,) * count for rows, count in pairs)))
