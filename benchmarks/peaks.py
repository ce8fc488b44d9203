"""What the compiler says a step needs, beside what the runtime of a real GPU says it used.

    python -m benchmarks.peaks --target h100 --output docs/measured/peaks_h100.json

For each point (plan, batch, sequence) of Qwen3-0.6B's whole train step: compiled for the chip as if
it were absent, compiled for the chip that is there, and run in a fresh process whose allocator then
says the most it held. Exits with 1 if a bound fails: present within 2 % at every point, absent
within 2 % in the median and 5 % at worst.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from benchmarks.shapes import QWEN3, TINY
from experiments.config import TrainConfig
from experiments.training.build import build, entry_of
from jaxckpt.absent.jobs import JobFailure, measure_many

KEPT = "full+attention+names:q,k,v,mid,gate,up"
POINTS = (
    *((plan, 8, 1024) for plan in ("none", KEPT, "dots_no_batch", "attention", "full")),
    *((plan, 8, 1024) for plan in ("uniform:4", "sqrt", "log", "14xfull/none")),
    *((plan, 2, 8192) for plan in ("attention", "full", "sqrt")),
    *(("full", 32, 1024), ("sqrt", 32, 1024)),
)
PRESENT, MEDIAN, WORST = 0.02, 0.02, 0.05


def config_of(point: tuple[str, int, int], tiny: bool) -> TrainConfig:
    """Returns the configuration of a point; `tiny` is a model for trying the script."""
    plan, batch, size = point
    model = TINY if tiny else QWEN3
    if tiny:
        batch, size, plan = 2, 64, plan.replace("14x", "2x")
    return TrainConfig(model=model, remat=plan, batch_size=batch, seq_len=size)


def child(place: int, tiny: bool):
    """Compiles and runs the step of one point; prints a JSON line."""
    import jax

    from experiments.training.loop import runtime_peak_bytes
    from experiments.training.step import init_state, resolve_model
    from jaxckpt.memory.measure import compile_step

    config, _ = resolve_model(config_of(POINTS[place], tiny))
    step, report = compile_step(build(config, "local"))
    state = jax.jit(lambda: init_state(config))()
    tokens = jax.numpy.zeros((config.batch_size, config.seq_len + 1), "int32")
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, tokens))
        seconds.append(time.perf_counter() - started)
    found = {"present_bytes": report.peak_bytes, "runtime_bytes": runtime_peak_bytes()}
    found |= {"seconds": statistics.median(seconds[1:]), "estimated": report.estimated_seconds}
    found |= {"attention": config.model.attention, "loss": float(metrics["loss"])}
    print(json.dumps(found))


def peaks(
    target: str = "h100",
    *,
    output: Path | None = None,
    tiny: Annotated[bool, Parameter(negative=())] = False,
    child_of: int | None = None,
):
    """Compare compiled and real peaks; exit with 1 if a bound fails."""
    if child_of is not None:
        child(child_of, tiny)
        return
    absent = _absent(target, tiny)
    rows = []
    for place, point in enumerate(POINTS):
        row = dict(zip(("plan", "batch_size", "seq_len"), point, strict=True))
        row |= {"absent_bytes": absent[place]} | _present(place, tiny)
        rows.append(row)
        print(_line(row), flush=True)
    failures = check(rows)
    print("\n".join(failures) or "every bound holds")
    if output is not None:
        _write(output, rows, target)
    sys.exit(bool(failures))


def _absent(target: str, tiny: bool) -> list[int | str]:
    """Returns each point's peak compiled for the absent chip, or why there is none."""
    jobs = [(entry_of(config_of(point, tiny), target), target) for point in POINTS]
    found = measure_many(jobs, parallel=6)
    return [str(one) if isinstance(one, JobFailure) else one.peak_bytes for one in found]


def _present(place: int, tiny: bool) -> dict[str, Any]:
    """Returns what a fresh process says of a point."""
    command = [sys.executable, "-m", "benchmarks.peaks", "--child-of", str(place)]
    done = subprocess.run(
        [*command, *(["--tiny"] if tiny else [])], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1], "traceback": done.stderr}
    return json.loads(done.stdout.splitlines()[-1])


def _line(row: dict[str, Any]) -> str:
    start = f"{row['plan']:38} {row['batch_size']:>3} x {row['seq_len']:<6}"
    if "error" in row:
        return f"{start} {row['error']}"
    sizes = [row["absent_bytes"], row["present_bytes"], row["runtime_bytes"]]
    shown = "  ".join(f"{s / 2**30:7.3f}" if isinstance(s, int) else str(s)[:60] for s in sizes)
    return f"{start} {shown} GiB  {1e3 * row['seconds']:.1f} ms, {row['attention']}"


def check(rows: list[dict[str, Any]]) -> list[str]:
    """Returns a line for each bound that does not hold."""
    failures = [f"{row['plan']}: {row['error']}" for row in rows if "error" in row]
    rows = [row for row in rows if row.get("runtime_bytes")]
    if not rows:
        return [*failures, "no point has a runtime peak: this needs a GPU"]
    failures += [
        f"{r['plan']}: {r['absent_bytes']}" for r in rows if type(r["absent_bytes"]) is str
    ]
    rows = [row for row in rows if isinstance(row["absent_bytes"], int)]
    off = lambda row, name: abs(row[name] / row["runtime_bytes"] - 1)
    for row in rows:
        if off(row, "present_bytes") > PRESENT:
            failures.append(f"{row['plan']}: present off by {off(row, 'present_bytes'):.2%}")
    away = [off(row, "absent_bytes") for row in rows]
    if away and statistics.median(away) > MEDIAN:
        failures.append(f"absent off by {statistics.median(away):.2%} in the median")
    if away and max(away) > WORST:
        failures.append(f"absent off by {max(away):.2%} at worst")
    return failures


def _write(path: Path, rows: list[dict[str, Any]], target: str):
    from benchmarks import record

    command = f"python -m benchmarks.peaks --target {target} --output {path}"
    path.write_text(json.dumps(record.origin(command) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    app = App(name="python -m benchmarks.peaks", help_format="plaintext")
    app.default(peaks)
    app()
