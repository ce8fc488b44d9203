"""The training loop: compile, say what it will take, then step, record and validate."""

import time
from pathlib import Path

import jax

from experiments.config import TrainConfig
from experiments.data import Batches, Corpus, validation_batches
from experiments.display import Display
from experiments.record import Record
from experiments.step import init_state, make_train_step, make_validation_step
from jaxckpt.memory.measure import compile_step
from jaxckpt.memory.report import MemoryReport, gib, report_of


def run(config: TrainConfig, corpus: Corpus, folder: Path):
    """Trains as `config` says and writes the record to `folder`.

    Nothing is written before the step has compiled, so a plan that does not fit the model leaves
    no folder behind.

    Raises:
      PlanError: The plan names what the model's blocks do not have.
    """
    display = Display(config.steps)
    display.print(f"data    {corpus.summary}")
    display.print(f"plan    {config.remat} on {config.model.num_blocks} blocks")
    step, report, compile_seconds = _compile(config)
    display.print(str(report))
    display.print(f"compiled in {compile_seconds:.1f} s; predicted peak {gib(report.peak_bytes)}")
    record = Record(folder, config, _header(config, corpus, report, compile_seconds))
    try:
        with display:
            loss = _train(config, corpus, step, report, record, display)
        display.print(f"validation loss {loss:.4f} nats a token; record in {record.path}")
    finally:
        record.close()


def _compile(config: TrainConfig):
    """Returns the compiled train step, its memory report and the seconds it took."""
    started = time.perf_counter()
    state = jax.eval_shape(lambda: init_state(config))
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), "int32")
    step, flops = compile_step(make_train_step(config), state, tokens, donate_argnums=0)
    return step, report_of(step, flops=flops), time.perf_counter() - started


def _header(config: TrainConfig, corpus: Corpus, report: MemoryReport, compile_seconds: float):
    device = jax.devices()[0]
    return {
        "plan": str(config.plan),
        "predicted_peak_bytes": report.peak_bytes,
        "predicted_temp_bytes": report.temp_bytes,
        "memory_source": report.source,
        "step_flops": report.flops,
        "compile_seconds": compile_seconds,
        "device": device.device_kind,
        "backend": device.platform,
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "corpus_tokens": corpus.num_tokens,
        "config": config.to_dict(),
    }


def _train(config, corpus, step, report, record, display) -> float:
    """Runs every step; returns the last validation loss in nats a token."""
    batches = Batches(
        tokens=corpus.train,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        seed=config.seed,
    )
    validate = _validator(config, corpus)
    state = jax.jit(lambda: init_state(config))()
    loss = float("nan")
    for number in range(1, config.steps + 1):
        tokens = batches.at(number - 1)
        started = time.perf_counter()
        state, metrics = step(state, tokens)
        metrics = jax.device_get(metrics)  # waits for the step
        seconds = time.perf_counter() - started
        row = {
            "step": number,
            **{name: float(value) for name, value in metrics.items()},
            "step_seconds": seconds,
            "tokens_per_second": config.batch_size * config.seq_len / seconds,
        }
        actual = runtime_peak_bytes()
        if actual is not None:
            row["peak_bytes_in_use"] = actual
        record.write(row)
        display.step(row, _memory_text(report, actual))
        every = config.validate_every
        if number == config.steps or (every and number % every == 0):
            loss = validate(state.params)
            record.write({"step": number, "validation_loss": loss})
            if number < config.steps:
                display.print(f"step {number}  validation loss {loss:.4f}")
    return loss


def _validator(config: TrainConfig, corpus: Corpus):
    """Returns a function from parameters to the loss on fixed validation windows."""
    batches = validation_batches(
        corpus.validation,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        max_batches=config.validation_batches,
    )
    step = jax.jit(make_validation_step(config))
    return lambda params: sum(float(step(params, tokens)) for tokens in batches) / len(batches)


def runtime_peak_bytes() -> int | None:
    """Returns the most device memory this process has used, or None where the runtime is silent."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def _memory_text(report: MemoryReport, actual: int | None) -> str:
    text = f"peak {gib(report.peak_bytes)} predicted"
    return text if actual is None else f"{text}, {gib(actual)} actual"
