"""A whole training step beside PyTorch's: time and memory of Qwen3-0.6B's shape on one GPU.

    python -m benchmarks.step --output docs/measured/step_h200.json

Every case runs in a fresh process on the same GPU, one after another; a case that the output holds
already, of the same GPU, is not run again, so a run cut short is resumed by the same command.
Memory is the most that the allocator held; of PyTorch's, what it reserved is written down too.
Needs the `peer` extra for PyTorch's side. Exits with 1 if a bound fails.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from benchmarks.record import write

_ENVIRONMENT = dict(os.environ)
KEPT = "full+attention+names:q,k,v,mid,gate,up"
# What the planner answers when asked for 16.41 GiB: the norms' inverses and rotated q, k as well.
FASTEST = (
    "attention+names:@rsqrt.1,@rms_norm_rotate.1,@rms_norm_rotate.2,@rsqrt.4,q,k,v,mid,gate,up"
)
_SHORT, _LONG = {"batch_size": 8, "seq_len": 1024}, {"batch_size": 2, "seq_len": 16384}
# Name -> (module of benchmarks/, its case). A pair's two sides stand next to each other.
CASES = {
    "short: fastest": ("step_jax", {**_SHORT, "plan": FASTEST}),
    "short: torch.compile": ("step_torch", _SHORT),
    "short: kept": ("step_jax", {**_SHORT, "plan": KEPT}),
    "short: full": ("step_jax", {**_SHORT, "plan": "full"}),
    "short: torch.compile + checkpoint": ("step_torch", {**_SHORT, "checkpoint": True}),
    "short: attention": ("step_jax", {**_SHORT, "plan": "attention"}),
    "short: torch.compile, budget 0.1": ("step_torch", {**_SHORT, "budget": 0.1}),
    "short: torch.compile, budget 0.5": ("step_torch", {**_SHORT, "budget": 0.5}),
    "long: attention": ("step_jax", {**_LONG, "plan": "attention"}),
    "long: torch + checkpoint": ("step_torch", {**_LONG, "mode": "eager", "checkpoint": True}),
    "short: none": ("step_jax", {**_SHORT, "plan": "none"}),
    "short: floor": ("floor", _SHORT),
    "long: floor": ("floor", _LONG),
    "short: kept, large chunks": (
        "step_jax",
        {**_SHORT, "plan": KEPT, "loss_chunk_tokens": 4096},
    ),
    "long: full": ("step_jax", {**_LONG, "plan": "full"}),
    "short: kept, in a loop": ("step_jax", {**_SHORT, "plan": KEPT, "unroll": 1}),
    "long: torch.compile + checkpoint": ("step_torch", {**_LONG, "checkpoint": True}),
    "short: kept, again": ("step_jax", {**_SHORT, "plan": KEPT}),
}
# What a plan gains over keeping everything, for a page's first screen.
GAIN = {
    "gain: none, in a loop": ("step_jax", {**_SHORT, "plan": "none", "unroll": 1}),
    "gain: none": ("step_jax", {**_SHORT, "plan": "none"}),
    "gain: kept": ("step_jax", {**_SHORT, "plan": KEPT}),
    "gain: attention": ("step_jax", {**_SHORT, "plan": "attention"}),
    "gain: full": ("step_jax", {**_SHORT, "plan": "full"}),
    "gain: torch.compile": ("step_torch", _SHORT),
}
# Ours, the peer's, at most this share of its time, at most this share of its memory.
BOUNDS = (
    ("short: fastest", "short: torch.compile", 0.75, 0.6),
    ("short: kept", "short: torch.compile", 0.75, 0.6),
    ("short: full", "short: torch.compile + checkpoint", 0.70, 1.0),
    ("short: attention", "short: torch.compile, budget 0.5", 0.75, 1.0),
    ("short: attention", "short: torch.compile, budget 0.1", 0.75, 1.0),
    ("long: attention", "long: torch + checkpoint", 0.52, 1.0),
)
# Ours, the floor, at most this multiple of it.
AIMS = (("short: fastest", "short: floor", 1.25), ("long: attention", "long: floor", 1.12))


def step(
    *,
    output: Path | None = None,
    group: Literal["short", "long", "gain"] | None = None,
    tiny: Annotated[bool, Parameter(negative=())] = False,
):
    """Time the step beside PyTorch's; exit with 1 if a bound fails.

    Args:
      output: JSON file to write, and to go on with.
      group: Run the cases of one shape alone, or those that show a plan's gain.
      tiny: Run our side of a tiny model, on any device, to try the script.
    """
    rows = _resume(output)
    cases = GAIN if group == "gain" else CASES
    missing = {n: c for n, c in cases.items() if n.startswith(group or "") and n not in rows}
    if not tiny:
        _prepare(missing)
    for name, (module, case) in missing.items():
        if tiny:
            if module != "step_jax":
                continue
            case = {**case, "batch_size": 2, "seq_len": 64, "tiny": True}
        rows[name] = _run(module, case)
        print(_line(name, rows[name]), flush=True)
        _write(output, rows)
    for line in (*_compared(rows), *(failures := check(rows))):
        print(line)
    sys.exit(bool(failures))


def _prepare(cases: dict[str, tuple[str, dict[str, Any]]]):
    """Compiles the peer's cases side by side; what they leave on disk saves each its minutes."""
    compiled = [
        {**case, "prepare": True}
        for module, case in cases.values()
        if module == "step_torch" and case.get("mode", "compile") == "compile"
    ]
    with ThreadPoolExecutor(len(compiled) or 1) as pool:
        list(pool.map(lambda case: _run("step_torch", case), compiled))


def _run(module: str, case: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{module}", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_ENVIRONMENT)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"case": case, "error": lines[-1]}
    return {"case": case, "gpu": gpu()} | json.loads(done.stdout.splitlines()[-1])


def gpu() -> str:
    """Returns the GPU's serial name, so that rows of another are told apart."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return done.stdout.strip().splitlines()[0]


def _resume(output: Path | None) -> dict[str, dict[str, Any]]:
    if output is None or not output.exists():
        return {}
    here, rows = gpu(), json.loads(output.read_text())["rows"]
    return {name: row for name, row in rows.items() if row.get("gpu") == here}


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
    """Returns the shares of the peer's time and memory, or None without both rows."""
    pair = rows.get(ours), rows.get(theirs)
    if any(row is None or "error" in row for row in pair):
        return None
    bytes_of = [row.get("peak_bytes", 1) for row in pair]
    return pair[0]["seconds"] / pair[1]["seconds"], bytes_of[0] / bytes_of[1]


def _compared(rows) -> list[str]:
    """Returns a line for each pair of which both ran."""
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


def _write(output: Path | None, rows):
    if output is None:
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process must hold nothing of the GPU
    from benchmarks.record import origin

    record = origin(f"python -m benchmarks.step --output {output}")
    ran = next((row for row in rows.values() if "device" in row), {})
    record |= {
        "backend": str(ran.get("device")).partition(" ")[0],
        "device": ran.get("device"),
        "rows": rows,
    }
    write(record, output)


if __name__ == "__main__":
    app = App(name="python -m benchmarks.step", help_format="plaintext")
    app.default(step)
    app()
