"""Trace and compile time do not depend on the number of blocks: L = 1024 against L = 16.

The block is a small Transformer's, as users compile. A block of a single matrix product compiles in
a quarter of a second, and the difference between two times that short is noise.
"""

import time

import jax

from benchmarks.executor_parts import nested, stacks
from benchmarks.result import Result, Row

PLANS = ("sqrt", "log", "binomial:8", "uniform:4")
SHORT, LONG = 16, 1024
SHAPE = nested.Shape(tokens=32, width=128, blocks=2, sequence=16)
RATIO = 1.3


def run(quick: bool = False) -> Result:
    """Times every plan, best of three after one warm-up; `quick` times one and bounds nothing."""
    long, plans = (64, PLANS[:1]) if quick else (LONG, PLANS)
    rows = [measure(plan, SHORT, long) for plan in plans]
    return Result(
        title=f"compile: trace + compile seconds, best of three, ratio at most {RATIO}",
        rows=rows,
        failures=[] if quick else check(rows),
    )


def measure(plan: str, short: int, long: int, repeats: int = 3) -> Row:
    """Returns the best trace and compile seconds at both lengths, taken in turns."""
    for num_blocks in (short, long):
        once(plan, num_blocks)
    times = {short: [], long: []}
    for _ in range(repeats):
        for num_blocks, found in times.items():
            found.append(once(plan, num_blocks))
    best = {n: min(found, key=sum) for n, found in times.items()}
    row: Row = {"plan": plan}
    for num_blocks, (trace, compiled) in best.items():
        row[f"trace L={num_blocks}"] = trace
        row[f"compile L={num_blocks}"] = compiled
    row["ratio"] = sum(best[long]) / sum(best[short])
    return row


def once(plan: str, num_blocks: int) -> tuple[float, float]:
    """Returns the seconds of tracing (with lowering) and of compiling, from empty caches."""
    jax.clear_caches()
    block, (params, carry) = nested.transformer(SHAPE)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((num_blocks, *leaf.shape[1:]), leaf.dtype), params
    )
    start = time.perf_counter()
    lowered = jax.jit(stacks.gradients(block, plan)).trace(params, carry).lower()
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def check(rows: list[Row]) -> list[str]:
    """Returns a line for each plan whose time grows with the number of blocks."""
    return [
        f"compile: {row['plan']}: ratio {row['ratio']:.2f}, at most {RATIO}"
        for row in rows
        if not row["ratio"] <= RATIO
    ]
