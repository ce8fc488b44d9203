"""A whole training step beside PyTorch's: time and memory of Qwen3-0.6B's shape on one GPU.

    python -m benchmarks.step --output docs/measured/step_h200.json

Every case runs in a fresh process on one GPU, one after another. A case that the output already has
from this GPU is not run again: the same command continues an interrupted run. Memory is the peak of
allocated bytes. For PyTorch, the bytes that its allocator reserved are recorded too.
Needs the `peer` extra for PyTorch's side. Exits with 1 if a bound fails.
"""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from benchmarks import cases
from benchmarks.cases import KEPT, LONG, SHORT
from benchmarks.record import Record, finish, kept, rows_of
from experiments.cli import main

# The planner's answer for 16.41 GiB; it also keeps the norms' inverses and the rotated q and k.
FASTEST = (
    "attention+names:@rsqrt.1,@rms_norm_rotate.1,@rms_norm_rotate.2,@rsqrt.4,q,k,v,mid,gate,up"
)
# Name -> (module of benchmarks/, its case). The two cases of a bound are neighbours in this order.
CASES = {
    "short: fastest": ("step_jax", {**SHORT, "plan": FASTEST}),
    "short: torch.compile": ("step_torch", SHORT),
    "short: kept": ("step_jax", {**SHORT, "plan": KEPT}),
    "short: full": ("step_jax", {**SHORT, "plan": "full"}),
    "short: torch.compile + checkpoint": ("step_torch", {**SHORT, "checkpoint": True}),
    "short: attention": ("step_jax", {**SHORT, "plan": "attention"}),
    "short: torch.compile, budget 0.1": ("step_torch", {**SHORT, "budget": 0.1}),
    "short: torch.compile, budget 0.5": ("step_torch", {**SHORT, "budget": 0.5}),
    "long: attention": ("step_jax", {**LONG, "plan": "attention"}),
    "long: torch + checkpoint": ("step_torch", {**LONG, "mode": "eager", "checkpoint": True}),
    "short: none": ("step_jax", {**SHORT, "plan": "none"}),
    "short: floor": ("floor", SHORT),
    "long: floor": ("floor", LONG),
    "short: kept, large chunks": ("step_jax", {**SHORT, "plan": KEPT, "loss_chunk_tokens": 4096}),
    "long: full": ("step_jax", {**LONG, "plan": "full"}),
    "short: kept, in a loop": ("step_jax", {**SHORT, "plan": KEPT, "unroll": 1}),
    "long: torch.compile + checkpoint": ("step_torch", {**LONG, "checkpoint": True}),
    "short: kept, again": ("step_jax", {**SHORT, "plan": KEPT}),
}
# Plans beside `none`, which keeps everything, for the README's table.
GAIN = {
    "gain: none, in a loop": ("step_jax", {**SHORT, "plan": "none", "unroll": 1}),
    "gain: none": ("step_jax", {**SHORT, "plan": "none"}),
    "gain: kept": ("step_jax", {**SHORT, "plan": KEPT}),
    "gain: attention": ("step_jax", {**SHORT, "plan": "attention"}),
    "gain: full": ("step_jax", {**SHORT, "plan": "full"}),
    "gain: torch.compile": ("step_torch", SHORT),
}
# Our case, PyTorch's case, the largest ratio of times, the largest ratio of memory.
BOUNDS = (
    ("short: fastest", "short: torch.compile", 0.75, 0.6),
    ("short: kept", "short: torch.compile", 0.75, 0.6),
    ("short: full", "short: torch.compile + checkpoint", 0.70, 1.0),
    ("short: attention", "short: torch.compile, budget 0.5", 0.75, 1.0),
    ("short: attention", "short: torch.compile, budget 0.1", 0.75, 1.0),
    ("long: attention", "long: torch + checkpoint", 0.52, 1.0),
)
# Our case, its floor, the aimed ratio of times; printed, and not a bound.
AIMS = (("short: fastest", "short: floor", 1.25), ("long: attention", "long: floor", 1.12))


def step(
    *,
    output: Path | None = None,
    group: Literal["short", "long", "gain"] | None = None,
    tiny: bool = False,
):
    """Time the step beside PyTorch's; exit with 1 if a bound fails.

    Args:
      output: JSON file to write; an interrupted run continues from it.
      group: Run only the cases of one shape, or only the cases of the README's table.
      tiny: Run only our side, with a tiny model on any device, to try the script.
    """
    here, found = gpu(), kept(output) or {}
    rows = {name: row for name, row in found.items() if row.get("gpu") == here}
    record = Record("step", output, rows)
    asked = GAIN if group == "gain" else CASES
    missing = {n: c for n, c in asked.items() if n.startswith(group or "") and n not in rows}
    if tiny:
        ours = {n: case for n, (module, case) in missing.items() if module == "step_jax"}
        missing = {n: ("step_jax", cases.tiny(case)) for n, case in ours.items()}
    else:
        _prepare(missing)
    for name, (module, case) in missing.items():
        *_, row = rows_of(module, case)
        rows[name] = {"case": case, "gpu": here} | row
        print(_line(name, rows[name]), flush=True)
        record.save()
    print("\n".join(_compared(rows)))
    finish(check(rows))


def _prepare(cases: dict[str, tuple[str, dict[str, Any]]]):
    """Compiles PyTorch's cases in parallel: the timed processes find the kernels on disk."""
    compiled = [
        {**case, "prepare": True}
        for module, case in cases.values()
        if module == "step_torch" and case.get("mode", "compile") == "compile"
    ]
    with ThreadPoolExecutor(len(compiled) or 1) as pool:
        list(pool.map(lambda case: list(rows_of("step_torch", case)), compiled))


def gpu() -> str:
    """Returns the GPU's name and unique id, which tell one GPU's rows from another's."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return done.stdout.strip().splitlines()[0]


def _line(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{name:36} {row['error']}"
    start = f"{name:36} {1e3 * row['seconds']:7.1f} ms"
    if "parts" in row:
        parts = ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in row["parts"].items())
        return f"{start}  {parts}"
    profile = ", ".join(f"{k} {1e3 * v:.1f}" for k, v in row.get("profile", {}).items())
    start += f"  {row['peak_bytes'] / 2**30:6.2f} GiB  compiled in {row['compile_seconds']:.0f} s"
    return f"{start}  {profile}"


def _ratios(rows, ours: str, theirs: str) -> tuple[float, float] | None:
    """Returns the ratios of times and of memory, or None if a row is missing or failed."""
    pair = rows.get(ours), rows.get(theirs)
    if any(row is None or "error" in row for row in pair):
        return None
    bytes_of = [row.get("peak_bytes", 1) for row in pair]
    return pair[0]["seconds"] / pair[1]["seconds"], bytes_of[0] / bytes_of[1]


def _compared(rows) -> list[str]:
    """Returns a line for each pair of cases that both ran."""
    lines = []
    for ours, theirs, *_ in BOUNDS:
        if found := _ratios(rows, ours, theirs):
            lines.append(f"{ours} / {theirs}: {found[0]:.3f} of the time, {found[1]:.3f} of memory")
    for ours, floor, most in AIMS:
        if found := _ratios(rows, ours, floor):
            lines.append(f"{ours} / {floor}: {found[0]:.3f} of it (aim: {most})")
    return lines


def check(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Returns a line for each bound that does not hold, and each case that failed."""
    failures = [f"{name}: {row['error']}" for name, row in rows.items() if "error" in row]
    for ours, theirs, most_time, most_bytes in BOUNDS:
        if (found := _ratios(rows, ours, theirs)) is None:
            continue
        if found[0] > most_time:
            failures.append(f"{ours}: {found[0]:.3f} of the time of {theirs}, bound {most_time}")
        if found[1] > most_bytes:
            failures.append(f"{ours}: {found[1]:.3f} of the memory of {theirs}, bound {most_bytes}")
    return failures


if __name__ == "__main__":
    main(step, package="benchmarks")
