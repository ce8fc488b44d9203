"""Blocks are evaluated as often as the schedule says: counted at run time, block by block.

Under a loss the last block is run in the forward pass and recorded in the backward pass, one
evaluation beyond the schedule's. `uniform` and `every` keep the last segment and have none.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

import jaxckpt
from benchmarks.executor_parts import stacks
from benchmarks.result import Result, Row

LENGTHS = (4, 8, 10, 16, 32)


def run(quick: bool = False) -> Result:
    """Counts every `binomial:C` with C < L, and every other schedule, at every length."""
    rows = [row for num_blocks in ((4,) if quick else LENGTHS) for row in measure(num_blocks)]
    return Result(
        title="evaluations: blocks run forward in one gradient, counted at run time",
        rows=rows,
        table=list(summary(rows)),
        failures=check(rows),
    )


def measure(num_blocks: int) -> Iterator[Row]:
    """Yields a row for each plan: what the schedule says, and what ran."""
    others = [p for p in stacks.plans(num_blocks) if not p.startswith("binomial")]
    for plan in (*others, *(f"binomial:{c}" for c in range(1, num_blocks))):
        schedule = stacks.schedule(plan, num_blocks)
        want = list(schedule.counts.evaluations)
        counted = count(functools.partial(jaxckpt.scan_blocks, remat=plan), num_blocks)
        yield {
            "L": num_blocks,
            "plan": plan,
            "extra_forwards": schedule.extra_forwards,
            "expected": num_blocks + schedule.extra_forwards,
            "evaluated": sum(counted),
            "each_block": counted == want,
        }


def count(stack: Callable, num_blocks: int) -> list[int]:
    """Returns how often each block of `stack(block, params, carry)` ran in one gradient."""
    found: Counter[int] = Counter()

    def block(x, block_i):
        jax.debug.callback(lambda index: found.update([int(index)]), block_i["index"])
        return jnp.sin(x * block_i["w"])

    def loss(w):
        blocks = {"w": w, "index": jnp.arange(num_blocks)}
        return stack(block, blocks, jnp.ones(2)).sum()

    jax.block_until_ready(jax.jit(jax.grad(loss))(jnp.ones(num_blocks)))
    jax.effects_barrier()
    return [found[block] for block in range(num_blocks)]


def check(rows: list[Row]) -> list[str]:
    """Returns a line for each plan whose blocks ran more or less often than it says."""
    return [
        f"evaluations: L={row['L']}, {row['plan']}: {row['evaluated']} blocks ran, "
        f"{row['expected']} expected"
        + ("" if row["each_block"] else "; single blocks differ from the schedule")
        for row in rows
        if row["evaluated"] != row["expected"] or not row["each_block"]
    ]


def summary(rows: list[Row]) -> Iterator[Row]:
    """Yields one row for each length and schedule."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["L"], row["plan"].partition(":")[0]), []).append(row)
    for (num_blocks, schedule), cases in groups.items():
        as_expected = [r["evaluated"] == r["expected"] and r["each_block"] for r in cases]
        yield {
            "L": num_blocks,
            "schedule": schedule,
            "plans": len(cases),
            "fewest": min(row["evaluated"] for row in cases),
            "most": max(row["evaluated"] for row in cases),
            "as the schedule says": f"{sum(as_expected)} of {len(cases)}",
        }
