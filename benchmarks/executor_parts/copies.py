"""The executor copies nothing of the size of the stacked weights.

The weights `[L, D, D]` are by far the largest array. With gradients as outputs, temporary memory is
slots, kept residuals and a few blocks' weights. With an SGD step on donated weights, the gradients
are the only temporary of the weights' size. The compiled module's text must not copy an array of
that shape. The memory of nested `jax.checkpoint` is printed too, without a bound.
"""

import re

import jax
import jax.numpy as jnp

from benchmarks.executor_parts import stacks
from benchmarks.result import Result, Row

PLANS = ("sqrt", "log", "binomial:4", "uniform:4")
NUM_BLOCKS, WIDTH, BATCH = 32, 512, 8
WEIGHT_BYTES = 4 * NUM_BLOCKS * WIDTH**2
BLOCKS_ALLOWED = 4  # weights of one block, its gradient, and what a matmul packs of them


def run(quick: bool = False) -> Result:
    """Compiles every plan with gradients as outputs and inside an SGD step."""
    plans = PLANS[:2] if quick else PLANS
    rows = [measure(plan, step) for plan in plans for step in (False, True)]
    rows += [measure(plan, False, nested=True) for plan in plans if plan in ("sqrt", "uniform:4")]
    return Result(
        title=f"copies: MiB of temporaries beside {WEIGHT_BYTES >> 20} MiB of stacked weights",
        rows=rows,
        table=[table_row(row) for row in rows],
        failures=check(rows),
    )


def measure(plan: str, step: bool, nested: bool = False) -> Row:
    """Returns the temporary bytes, their bound, and the number of copies of stacked arrays."""
    grads = stacks.gradients(stacks.heavy_block, plan, nested=nested)

    def sgd(params, carry):
        of_params, of_carry = grads(params, carry)
        # The norm needs every gradient before the first weight may change.
        scale = 1e-3 / (1.0 + jnp.sqrt(jnp.vdot(of_params, of_params)))
        return params - scale * of_params, of_carry

    params = jax.ShapeDtypeStruct((NUM_BLOCKS, WIDTH, WIDTH), jnp.float32)
    carry = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    jitted = jax.jit(sgd, donate_argnums=0) if step else jax.jit(grads)
    compiled = jitted.trace(params, carry).lower().compile()
    # One block's residuals are its input and tanh's output; a recorded segment holds them all.
    schedule = stacks.schedule(plan, NUM_BLOCKS)
    carries = schedule.peak_slots + 1 + 2 * schedule.counts.peak_residual_blocks
    allowed = carries * 4 * BATCH * WIDTH + BLOCKS_ALLOWED * 4 * WIDTH**2
    return {
        "plan": plan,
        "run by": "nested" if nested else "executor",
        "gradients": "inside a step" if step else "outputs",
        "temp_bytes": stacks.temp_bytes(compiled),
        "allowed_bytes": None if nested else allowed + (WEIGHT_BYTES if step else 0),
        "copies": None if nested else count_copies(compiled.as_text() or ""),
    }


def count_copies(module: str) -> int:
    """Returns the copies of an array of the stacked weights' shape in a compiled module's text."""
    shape = rf"f32\[{NUM_BLOCKS},{WIDTH},{WIDTH}\]"
    return len(re.findall(rf"= {shape}\S* copy(?:-start)?\(", module))


def table_row(row: Row) -> Row:
    """Returns the row with sizes in MiB."""
    mib = lambda size: None if size is None else f"{size / 2**20:.2f}"
    shown = {name: row[name] for name in ("plan", "run by", "gradients")}
    shown |= {"temp": mib(row["temp_bytes"]), "at most": mib(row["allowed_bytes"])}
    return shown | {"copies": row["copies"]}


def check(rows: list[Row]) -> list[str]:
    """Returns a line for each executor run with too many temporaries, or any copy."""
    failures = []
    for row in rows:
        if row["allowed_bytes"] is None:
            continue
        name = f"copies: {row['plan']}, gradients {row['gradients']}"
        if row["temp_bytes"] > row["allowed_bytes"]:
            failures.append(f"{name}: temp {row['temp_bytes']}, at most {row['allowed_bytes']}")
        if row["copies"]:
            failures.append(f"{name}: {row['copies']} copies of a stacked array")
    return failures
