"""Our side of the step benchmark: one training step under a plan, compiled, timed and profiled.

    python -m benchmarks.step_jax '{"batch_size": 8, "seq_len": 1024, "plan": "full"}'

Prints one JSON line. The model is Qwen3-0.6B's shape; `tiny` is one for trying the script.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks import kernels
from benchmarks.origin import device
from benchmarks.peaks import QWEN3, TINY
from experiments.build import build
from experiments.config import TrainConfig
from experiments.loop import runtime_peak_bytes
from experiments.step import init_state, resolve_model
from jaxckpt.memory.measure import compile_step

_WARM_UP, _BLOCKS, _STEPS, _PROFILED = 3, 5, 4, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is run; `unroll` and `loss_chunk_tokens` of 0 are the defaults' choice."""

    batch_size: int
    seq_len: int
    plan: str
    unroll: int = 0
    loss_chunk_tokens: int = 0
    tiny: bool = False

    def config(self) -> TrainConfig:
        """Returns the training run's configuration."""
        return TrainConfig(
            model=TINY if self.tiny else QWEN3,
            remat=self.plan,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            unroll=self.unroll,
            loss_chunk_tokens=self.loss_chunk_tokens,
        )


def run(case: Case) -> dict[str, Any]:
    """Returns seconds a step, peaks, the loss and, on a GPU, where the time goes."""
    config, _ = resolve_model(case.config())
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
        "peak_bytes": peak or report.peak_bytes,
        "compile_seconds": compile_seconds,
        "unroll": config.unroll,
        "attention": config.model.attention,
        "step_flops": report.flops,
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
        return kernels.by_kind(Path(folder), steps=_PROFILED)


if __name__ == "__main__":
    print(json.dumps(run(Case(**json.loads(sys.argv[1])))))
