"""The executor against nested `jax.checkpoint`: temporary bytes, and time in interleaved pairs.

The block is Qwen3's (`jaxckpt.models`): width D, heads of 128, query width 2 D, key and value width
D, MLP width 3 D; `--width 1024 --blocks 28 --dtype bf16` is Qwen3-0.6B's stack.

There are two rivals: `scan_blocks(..., nested=True)`, and a two-level `lax.scan` written by hand.
The one written by hand does not checkpoint its last segment, like the executor. It recomputes the
same number of blocks as the executor under `uniform:n`, and up to one block more in each segment
under `sqrt`; the table has the numbers. The executor is also compared with itself, which shows the
noise of the times.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jaxckpt
from benchmarks.cases import Shape
from benchmarks.executor_parts import evaluations, stacks
from benchmarks.result import Result, Row
from jaxckpt.models.config import TransformerConfig
from jaxckpt.models.transformer import Block, rotary_table

RATIO = 1.02  # of times on an accelerator; a shared CPU's differ by as much from run to run


QUICK = Shape(tokens=32, width=128, blocks=4, sequence=16, pairs=2)


def run(quick: bool = False, shape: Shape | None = None) -> Result:
    """Compares the rivals under `sqrt` and `uniform:n`; `quick` is small and `sqrt` alone."""
    shape = QUICK if quick else shape or Shape()
    segments = next(n for n in range(int(shape.blocks**0.5), 0, -1) if shape.blocks % n == 0)
    plans = ("sqrt",) if quick else ("sqrt", f"uniform:{segments}")
    rows = [row for plan in plans for row in measure(plan, shape)]
    sizes = f"{shape.blocks} blocks, width {shape.width}, {shape.tokens} tokens, {shape.dtype}"
    times = not quick and jax.default_backend() != "cpu"
    return Result(
        title=f"nested: executor / nested jax.checkpoint, {sizes}",
        rows=rows,
        table=[table_row(row) for row in rows],
        notes=() if times else ("times on a CPU, and of small forms, have no bound",),
        failures=check(rows, times),
    )


def measure(plan: str, shape: Shape) -> list[Row]:
    """Returns a row for each rival under a plan."""
    ours = functools.partial(jaxckpt.scan_blocks, remat=plan)
    rivals = {
        "itself": ours,
        "nested=True": functools.partial(ours, nested=True),
        "by hand": functools.partial(two_level, plan=plan),
    }
    block, args = transformer(shape)
    executor = compiled(ours, block, args)
    rows = []
    for name, stack in rivals.items():
        rival = executor if stack is ours else compiled(stack, block, args)
        ours_seconds, rival_seconds = paired_seconds(executor, rival, args, shape.pairs)
        ratios = [a / b for a, b in zip(ours_seconds, rival_seconds, strict=True)]
        row: Row = {"plan": plan, "rival": name}
        sides = (("executor", ours, executor, ours_seconds), ("rival", stack, rival, rival_seconds))
        for who, run, executable, seconds in sides:
            row[f"{who}_evaluations"] = sum(evaluations.count(run, shape.blocks))
            row[f"{who}_temp_bytes"] = stacks.temp_bytes(executable)
            row[f"{who}_seconds"] = statistics.median(seconds)
        rows.append(row | {"ratio": statistics.median(ratios), "ratios": ratios})
    return rows


def two_level(block: Callable, params, carry, plan: str):
    """Returns the stack's output: each segment but the last one runs under `jax.checkpoint`.

    Args:
      block: `block(carry, params_i) -> carry`.
      params: Leaves `[L, ...]`.
      carry: The first block's input.
      plan: `uniform:n`, where n divides L; or `sqrt`, where the number of segments is the largest
        divisor of L up to its root, and blocks are checkpointed inside the segments.
    """
    length = jax.tree.leaves(params)[0].shape[0]
    schedule, _, argument = plan.partition(":")
    root = next(n for n in range(int(length**0.5), 0, -1) if length % n == 0)
    segments = int(argument) if argument else root
    last = length - length // segments
    apply = jax.checkpoint(block, prevent_cse=False) if schedule == "sqrt" else block

    def segment(carry, params):
        return lax.scan(lambda x, p: (apply(x, p), None), carry, params)[0]

    kept = jax.tree.map(lambda x: x[:last].reshape(segments - 1, -1, *x.shape[1:]), params)
    outer = jax.checkpoint(segment, prevent_cse=False)
    carry, _ = lax.scan(lambda x, p: (outer(x, p), None), carry, kept)
    return segment(carry, jax.tree.map(lambda x: x[last:], params))


def transformer(shape: Shape):
    """Returns `(block, (params, x))`: one Transformer block as a function, and its stack."""
    config = TransformerConfig(
        num_blocks=shape.blocks,
        d_model=shape.width,
        num_heads=2 * shape.width // 128,
        num_kv_heads=shape.width // 128,
        head_dim=128,
        d_ff=3 * shape.width,
        dtype=shape.dtype,
    )
    sequence = min(shape.sequence, shape.tokens)
    module, rotary = Block(config), rotary_table(sequence, config.head_dim, config.rope_theta)
    x = jax.random.normal(jax.random.key(1), (shape.tokens // sequence, sequence, shape.width))
    x = x.astype(config.dtype)
    keys = jax.random.split(jax.random.key(0), shape.blocks)
    params = jax.vmap(lambda key: module.init(key, x[:1], rotary)["params"])(keys)
    return lambda x, p: module.apply({"params": p}, x, rotary), (params, x)


def compiled(stack: Callable, block: Callable, args):
    """Returns the executable of the gradients of parameters and input."""
    loss = lambda params, x: jnp.square(stack(block, params, x).astype(jnp.float32)).mean()
    return jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*args).lower().compile()


def paired_seconds(first, second, args, pairs: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of both after a warm-up; they run in turns, every other pair swapped."""
    timed: list[tuple[Any, list[float]]] = [(first, []), (second, [])]
    for number in range(pairs + 1):
        for executable, seconds in timed if number % 2 else reversed(timed):
            start = time.perf_counter()
            jax.block_until_ready(executable(*args))
            if number:
                seconds.append(time.perf_counter() - start)
    return timed[0][1], timed[1][1]


def table_row(row: Row) -> Row:
    """Returns the row with sizes in MiB and times in milliseconds, the executor's first."""
    both = lambda name, form: f"{form(row[f'executor_{name}'])} / {form(row[f'rival_{name}'])}"
    return {
        "plan": row["plan"],
        "rival": row["rival"],
        "blocks run": both("evaluations", str),
        "temp MiB": both("temp_bytes", lambda size: f"{size / 2**20:.1f}"),
        "ms": both("seconds", lambda seconds: f"{1e3 * seconds:.1f}"),
        "ratio of times": f"{row['ratio']:.3f}",
    }


def check(rows: list[Row], times: bool) -> list[str]:
    """Returns a line for each rival that needs less memory or, if `times`, less time."""
    failures = []
    for row in rows:
        name = f"nested: {row['plan']} against {row['rival']}"
        ours, rival = row["executor_temp_bytes"], row["rival_temp_bytes"]
        if ours > rival:
            failures.append(f"{name}: executor's temp {ours}, the rival's {rival}")
        if times and not row["ratio"] <= RATIO:
            failures.append(f"{name}: ratio of times {row['ratio']:.3f}, at most {RATIO}")
    return failures
