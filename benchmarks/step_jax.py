"""Our side of the step benchmark: one training step under a plan, compiled, timed and profiled.

    python -m benchmarks.step_jax '{"batch_size": 8, "seq_len": 1024, "plan": "full"}'

Prints one JSON line. The model is Qwen3-0.6B's shape; `tiny` is a small model to try the script.

`by_kind` splits the time of a GPU's step by the kind of kernel, from a profile:

    with jax.profiler.trace(folder): ...
    by_kind(folder, steps=3)     # {'matrix products': 0.040, ...} seconds a step

Limits: NVIDIA GPUs only. A kernel's kind is told by its name, and the names are those of XLA,
cuBLAS and cuDNN in 2026. Kernels that run at the same time are each counted in full.
"""

import collections
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.cases import Case, config_of
from benchmarks.record import device
from experiments.training.build import build
from experiments.training.loop import runtime_peak_bytes
from experiments.training.step import init_state, resolve_model
from jaxckpt.memory.measure import compile_step

_WARM_UP, _BLOCKS, _STEPS, _PROFILED = 3, 5, 4, 3


def run(case: Case) -> dict[str, Any]:
    """Returns the seconds of a step, peaks, the loss and, on a GPU, seconds by kind of kernel."""
    config, _ = resolve_model(config_of(case, case["plan"]))
    started = time.perf_counter()
    step, report = compile_step(build(config, "local"))
    compile_seconds = time.perf_counter() - started
    state = jax.jit(lambda: init_state(config))()
    shape = (config.batch_size, config.seq_len + 1)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size)
    for _ in range(_WARM_UP):
        state, metrics = step(state, tokens)
    jax.block_until_ready(state)
    seconds = []
    for _ in range(_BLOCKS):
        started = time.perf_counter()
        for _ in range(_STEPS):
            state, metrics = step(state, tokens)
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - started) / _STEPS)
    peak = runtime_peak_bytes()
    return {
        "seconds": statistics.median(seconds),
        "seconds_of_blocks": seconds,
        "compiled_peak_bytes": report.peak_bytes,
        "runtime_bytes": peak,
        "peak_bytes": peak or report.peak_bytes,
        "compile_seconds": compile_seconds,
        "unroll": config.unroll,
        "attention": config.model.attention,
        "step_flops": report.flops,
        "estimated_seconds": report.estimated_seconds,
        "recomputed_flops": report.recomputed_flops,
        "loss": float(metrics["loss"]),
        "profile": _profile(step, state, tokens),
        "versions": {"jax": jax.__version__},
        "device": device(),
    }


def _profile(step, state, tokens) -> dict[str, float]:
    """Returns the seconds of a step by kind of kernel; empty where there is no GPU."""
    if jax.default_backend() != "gpu":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(_PROFILED):
                state, _ = step(state, tokens)
            jax.block_until_ready(state)
        return by_kind(Path(folder), steps=_PROFILED)


# The first match names the kind.
_KINDS = (
    ("attention forward", r"(fprop|flash_fwd|sdpa.*fwd)"),
    ("attention backward", r"(bprop|flash_bwd|sdpa.*bwd|cudnn.*(dq|dot_do))"),
    ("copies", r"(memcpy|memset|^copy|_copy)"),
    ("matrix products", r"(gemm|nvjet|cutlass|xmma|splitk|cublas)"),
)
OTHER = "elementwise and reductions"


def by_kind(folder: Path, *, steps: int) -> dict[str, float]:
    """Returns the seconds of a step that each kind of kernel takes, largest first.

    Args:
      folder: Where `jax.profiler.trace` wrote one trace.
      steps: Steps that the trace holds.
    """
    found: Any = collections.Counter()  # of seconds
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        found[kind_of(event.name)] += event.duration_ns / 1e9 / steps
    return dict(found.most_common())


def kind_of(name: str) -> str:
    """Returns the kind of a kernel from its name."""
    return next((kind for kind, text in _KINDS if re.search(text, name, re.IGNORECASE)), OTHER)


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
