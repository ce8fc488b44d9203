"""How temporary memory grows with the number of blocks, as XLA compiled it, beside theory's bound.

The stack has almost no weights and large carries, so that carries dominate the memory. Nothing is
run and nothing is allocated. Targets are the local backend and, where their compilers are
installed, an absent TPU and an absent GPU. A TPU compiler moves arrays of up to about 100 MiB into
on-chip memory. Carries of absent chips are therefore 32 MiB instead of 4 MiB, so that they stay in
main memory.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.executor_parts import stacks
from benchmarks.result import Result, Row
from jaxckpt.absent import launch
from jaxckpt.memory.measure import measure as measure_absent
from jaxckpt.targets.target import parse_target

LENGTHS = (16, 64, 256, 1024)
PLANS = ("none", "full", "sqrt", "log", "binomial:8")
ABSENT = {"TPU v5e (not present)": "v5e-1", "NVIDIA H100 (not present)": "h100"}
CARRY, ABSENT_CARRY = (1024, 1024), (4096, 2048)

# (fn, *abstract) -> temporary bytes of the compiled function, or None where it does not fit.
CompileTemp = Callable[..., int | None]


def local(fn: Callable, *args: jax.ShapeDtypeStruct) -> int | None:
    """Returns the temporary bytes of `fn(*args)` on the backend of this process."""
    return stacks.temp_bytes(jax.jit(fn).trace(*args).lower().compile())


def absent(target: str) -> CompileTemp:
    """Returns a function that compiles for an absent chip and returns the temporary bytes.

    Raises:
      Unavailable: The chip's compiler is not installed.
    """
    launch.check_available(parse_target(target))

    def compile_temp(fn: Callable, *args: jax.ShapeDtypeStruct) -> int | None:
        report = measure_absent(fn, *args, target=target)
        return report.temp_bytes if report.fits else None

    return compile_temp


def run(quick: bool = False) -> Result:
    """Compiles every plan at every length for every target; `quick` is local and shorter."""
    lengths = LENGTHS[:2] if quick else LENGTHS
    targets: dict[str, tuple[CompileTemp, tuple[int, int]]] = {record.device(): (local, CARRY)}
    notes = []
    for name, target in () if quick else ABSENT.items():
        try:
            targets |= {name: (absent(target), ABSENT_CARRY)}
        except launch.Unavailable as error:
            notes.append(f"{name} skipped: {error}")
    rows = []
    for target, (compile_temp, carry) in targets.items():
        rows += measure(compile_temp, target, lengths, carry)
    fits = fit(rows)
    return Result(
        title="temp: carries in temporary memory (theory's in brackets)",
        rows=rows,
        table=table(rows, fits),
        notes=notes,
        failures=check(fits),
    )


def measure(
    compile_temp: CompileTemp, target: str, lengths: Sequence[int], shape: tuple[int, int] = CARRY
) -> list[Row]:
    """Returns a row for each plan and length: the temporary bytes of loss and gradients."""
    rows = []
    for plan in PLANS:
        for num_blocks in lengths:
            params = jax.ShapeDtypeStruct((num_blocks, 1), jnp.float32)
            carry = jax.ShapeDtypeStruct(shape, jnp.float32)
            temp = compile_temp(stacks.gradients(stacks.light_block, plan), params, carry)
            row = {"target": target, "plan": plan, "L": num_blocks, "temp_bytes": temp}
            rows.append(row | {"carry_bytes": 4 * shape[0] * shape[1]})
    return rows


def fit(rows: list[Row]) -> list[Row]:
    """Returns, for each target and plan with a bound, the fitted number and the bound."""
    groups: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row["temp_bytes"] is not None:
            carries = row["temp_bytes"] / row["carry_bytes"]
            groups.setdefault((row["target"], row["plan"]), []).append((row["L"], carries))
    fits = []
    for (target, plan), points in groups.items():
        if plan in _FITS and len(points) > 1:
            name, function, least, most = _FITS[plan]
            value = function(*map(np.array, zip(*points, strict=True)))
            passed = least <= value <= most
            bound = f"at most {most:g}" if least == -math.inf else f"{least:g} to {most:g}"
            row = {"target": target, "plan": plan, "fitted": name, "value": value}
            fits.append(row | {"bound": bound, "passed": passed})
    return fits


_slope = lambda lengths, carries: float(np.polyfit(lengths, carries, 1)[0])
_log_log_slope = lambda lengths, carries: _slope(np.log(lengths), np.log(carries))
_a_doubling = lambda lengths, carries: float(np.max(np.diff(carries) / np.diff(np.log2(lengths))))

# Plan -> the fitted number's name, how it is fitted, and its least and largest value.
_FITS = {
    "full": ("carries a block", _slope, 0.95, 1.05),
    "sqrt": ("log-log slope", _log_log_slope, -math.inf, 0.55),
    "log": ("carries a doubling", _a_doubling, -math.inf, 1.1),
    "binomial:8": ("carries a doubling", _a_doubling, -math.inf, 0.1),
}


def check(fits: list[Row]) -> list[str]:
    """Returns a line for each bound that does not hold."""
    return [
        f"temp: {row['target']}, {row['plan']}: {row['fitted']} {row['value']:.3f}, {row['bound']}"
        for row in fits
        if not row["passed"]
    ]


def table(rows: list[Row], fits: list[Row]) -> list[Row]:
    """Returns one row for each target and plan: carries at every length, fit, bound, verdict."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        temp, carry = row["temp_bytes"], row["carry_bytes"]
        start = {"target": row["target"], "plan": row["plan"], "carry": f"{carry >> 20} MiB"}
        line = found.setdefault((row["target"], row["plan"]), start)
        held = "does not fit" if temp is None else f"{temp / carry:.1f}"
        line[f"L={row['L']}"] = f"{held} ({theory(row['plan'], row['L'])})"
    for row in fits:
        fitted = {"fitted": f"{row['value']:.3f} {row['fitted']}", "bound": row["bound"]}
        found[row["target"], row["plan"]] |= fitted | {"passed": row["passed"]}
    return list(found.values())


def theory(plan: str, num_blocks: int) -> int:
    """Returns the carries that a plan holds by the counts of docs/theory.md.

    The residuals of a light block are its input, tanh's output and one minus that output: R = 3a.
    `none` holds the residuals of every block. Every other plan holds the residuals of one block at
    a time, and the carries that it keeps: `full` keeps L, and a schedule keeps its slots and the
    last block's input. The input of the last block is also one of its residuals, and is counted
    once.
    """
    residuals = 3
    if plan == "none":
        return residuals * num_blocks
    kept = num_blocks if plan == "full" else stacks.schedule(plan, num_blocks).peak_slots + 1
    return kept + residuals - 1
