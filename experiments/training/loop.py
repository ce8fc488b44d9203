"""The training loop: compile, report memory and time, then step, record, validate and save.

The device does not wait for the host: the metrics of a step are read after the next step is
dispatched and the batch of the one after it is put. A validation, a save and a stop need the state
of their step, so they read the metrics of that step first.
"""

import collections
import contextlib
import dataclasses
import functools
import operator
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from experiments.config import ConfigError, RunError, TrainConfig
from experiments.data import Corpus
from experiments.processes.join import SharedFlag, is_first
from experiments.training import choose_plan
from experiments.training.batches import held_out_batches, put_batch, training_batches
from experiments.training.build import build
from experiments.training.checkpoints import Checkpoints, about_run, check_same_run
from experiments.training.compilation import keep_compiled
from experiments.training.display import Display, duration, next_commands, shown_path
from experiments.training.mesh import abstract_state, batch_sharding, make_mesh, put_whole
from experiments.training.plan_checks import against_none, explained
from experiments.training.record import Record
from experiments.training.step import (
    TrainState,
    init_state,
    make_validation_step,
    resolve_model,
    state_bytes,
)
from experiments.training.stopping import StopRequest
from experiments.training.utilization import StepFlops, step_flops
from experiments.weights.load import load_params
from jaxckpt.compiled.report import MemoryReport, iec
from jaxckpt.memory.measure import compile_step
from jaxckpt.targets.present import chip_of
from jaxckpt.targets.target import LOCAL

_SAMPLED_TOKENS = 240
_WARM_UP = 2  # the first step loads the program, the second one is dispatched meanwhile
_LEAST_SECONDS = 1e-6  # of a coarse clock
_MOST_TIMED, _TIMED_SHARE = 10, 20  # steps that time the device: one in 20, at most 10


def run(config: TrainConfig, corpus: Corpus, folder: Path) -> int | None:
    """Trains as `config` says and writes the record to `folder`, which is from `run_folder`.

    Nothing is written before the step is compiled, so a plan that does not fit the model leaves no
    folder behind.

    Returns:
      The number of the signal that stopped the run; None if it came to its end.

    Raises:
      PlanError: The plan names a value that the model's blocks do not have.
      BudgetError: The plan is `auto`, and no plan is within the budget.
      ConfigError: There is no checkpoint to resume from, or it is of another run; the plan needs
        more than the budget.
      RunError: The disk is full, or gradients stay non-finite.
    """
    started = time.perf_counter()
    display = Display(config.steps, quiet=not is_first())
    keep_compiled(config.compile_cache, display.print)
    display.print(f"data    {corpus.summary}")
    display.print(f"plan    {config.remat} on {config.model.num_blocks} blocks")
    limit = choose_plan.limit_bytes(config, "local")
    host_limit = choose_plan.host_limit_bytes(config)
    if too_much := choose_plan.excess(limit, "local"):
        display.print(f"warning: {too_much}")
    with display.waiting("starting the device"):
        resolve_model(config)  # refuses a kernel or dtype that the chip lacks, before planning
    with contextlib.closing(Checkpoints(folder, config.keep)) as checkpoints:
        resumed, about = None, None
        if config.resume:
            resumed, about, changed = _find_checkpoint(config, corpus, checkpoints)
            for line in changed:
                display.print(line)
        checkpoints.check_own()
        config, planned_for = choose_plan.settle(config, limit, about, display)
        here, choices = resolve_model(config)
        for choice in choices:
            display.print(f"model   {choice}")
        with display.waiting("compiling the step"):
            step, report, flops, compile_seconds, gain = _compile(here, display)
        choose_plan.check_within(config, report, limit, host_limit)
        with display.waiting("making the first state"):
            state = _first_state(checkpoints, resumed, here)
        display.print(str(report))
        if gain:
            display.print(gain)
        display.print(
            f"step ready in {compile_seconds:.1f} s; predicted peak {iec(report.peak_bytes)}"
        )
        if resumed is not None:
            display.print(f"resumed at step {resumed} from {checkpoints.folder}")
        header = _header(config, corpus, report, flops, compile_seconds)
        header |= {"budget_bytes": limit, "host_budget_bytes": host_limit}
        header |= {"planned_for": planned_for}
        weights, moments = state_bytes(state)
        header |= {"weight_bytes_a_parameter": weights, "optimizer_bytes_a_parameter": moments}
        display.print(
            f"state   {weights + moments:.2f} bytes a parameter: {weights:.2f} of weights, "
            f"{moments:.2f} of the optimizer"
        )
        if resumed is None and is_first():
            checkpoints.remove_all()
        own_header = header if is_first() else None
        with contextlib.closing(Record(folder, config, own_header, resumed)) as record:
            with display.waiting("reading the validation data"):
                training = _Training(
                    config, planned_for, corpus, step, report, flops, record, checkpoints, display
                )
            with display, StopRequest() as stop:
                stopped_by = training.run(state, stop)
        if stopped_by is None:
            seconds = time.perf_counter() - started
            display.print(f"done in {duration(seconds)}; {training.peaks()}")
            saved = checkpoints.latest() is not None
            for line in next_commands(shown_path(folder), config.steps, saved=saved):
                display.print(line, whole=True)
        return stopped_by


def _find_checkpoint(
    config: TrainConfig, corpus: Corpus, checkpoints: Checkpoints
) -> tuple[int, dict[str, Any], list[str]]:
    """Returns the step to go on from, the JSON of its checkpoint, and a line for each change."""
    step = checkpoints.latest()
    if step is None:
        raise ConfigError(f"{checkpoints.folder} holds no complete checkpoint to resume from")
    about = checkpoints.about(step)
    if step > config.steps:
        raise ConfigError(
            f"{checkpoints.folder} is at step {step} already; --steps is {config.steps}"
        )
    return step, about, check_same_run(config, corpus.sha256, about)


def _first_state(checkpoints: Checkpoints, resumed: int | None, config: TrainConfig) -> TrainState:
    like = abstract_state(config, make_mesh(config))
    if resumed is not None:
        return checkpoints.load(resumed, like)
    options: dict[str, Any] = {}
    if config.mesh is not None:
        options["out_shardings"] = jax.tree.map(lambda leaf: leaf.sharding, like)
    make = functools.partial(init_state, config)
    if config.init is None:
        return jax.jit(make, **options)()
    return jax.jit(make, donate_argnums=0, **options)(load_params(config.init, like.params))


def _compile(config: TrainConfig, display: Display):
    """Returns the compiled step, its report and FLOPs, the seconds it took, and the plan's gain."""
    started = time.perf_counter()
    built = build(config, "local")
    step, report = compile_step(built)
    seconds = time.perf_counter() - started
    if config.explain:
        for line in explained(built):
            display.print(line)
    needless, gain = against_none(built, report)
    report = dataclasses.replace(report, findings=(*report.findings, *needless))
    for finding in report.findings:
        display.print(f"warning: {finding}")
    return step, report, step_flops(config, built), seconds, gain


def _header(
    config: TrainConfig,
    corpus: Corpus,
    report: MemoryReport,
    flops: StepFlops,
    compile_seconds: float,
):
    device = jax.devices()[0]
    return {
        "plan": str(config.plan),
        "predicted_peak_bytes": report.peak_bytes,
        "predicted_temp_bytes": report.temp_bytes,
        "memory_source": report.source,
        "step_flops": report.flops,
        "recomputed_flops": report.recomputed_flops,
        "model_flops": flops.model,
        "hardware_flops": flops.hardware,
        "peak_flops_per_second": peak_flops_per_second(config),
        **{name: report.as_json()[name] for name in ("findings", "buffers", "understood")},
        "compile_seconds": compile_seconds,
        "device": device.device_kind,
        "devices": 1 if config.mesh_shape is None else config.mesh_shape.size,
        "processes": jax.process_count(),
        "backend": device.platform,
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "corpus_tokens": corpus.num_tokens,
        "config": config.to_dict(),
    }


class _Training:
    """The state of one run that the parts of its loop share."""

    def __init__(
        self, config, planned_for, corpus, step, report, flops, record, checkpoints, display
    ):
        self.config, self.planned_for = config, planned_for
        self.corpus, self.step, self.report, self.flops = corpus, step, report, flops
        self.record, self.checkpoints, self.display = record, checkpoints, display
        self.peak_flops = peak_flops_per_second(config)
        self.validate = _validator(config, corpus)
        self.writer = _tensorboard(config, record.path.parent)
        self.where = batch_sharding(config)
        self.running = collections.deque()  # number and metrics of each step that is not read
        self.seconds: list[float] = []  # of each step that is read

    def run(self, state: TrainState, stop: StopRequest) -> int | None:
        """Steps until the end or a request to stop; returns the signal of that request."""
        config = self.config
        batches = training_batches(config, self.corpus)
        is_set, loss = SharedFlag(), None
        done = self.display.done = int(state.step)
        batch = put_batch(batches, done, self.where)
        self.since = time.perf_counter()
        for number in range(done + 1, config.steps + 1):
            state, metrics = self.step(state, batch)
            self.running.append((number, metrics))
            batch = put_batch(batches, number, self.where)
            validates, saves = (
                every and (number % every == 0 or number == config.steps)
                for every in (config.validate_every or config.steps, config.save_every)
            )
            self._read(left=0 if validates or saves else 1)
            if validates:
                loss = self._validate(state, number)
            if is_set.anywhere(stop.signal_name is not None):
                self._read(left=0)
                self._save(state)
                self.checkpoints.wait()
                self.display.end_steps()
                why = stop.signal_name or "another process was stopped"
                self.display.print(
                    f"{why}: saved step {number} in {self.checkpoints.folder}; "
                    "--resume goes on from there"
                )
                return signal.Signals[stop.signal_name or "SIGTERM"].value
            if saves:
                self._save(state)
            if validates or saves:
                self.since = time.perf_counter()
        self.checkpoints.wait()
        if loss is None:  # a resumed run had no steps left
            loss = self.record.validations.get(config.steps)
        if loss is None:
            loss = self._validate(state, config.steps)
        self.display.end_steps()
        self.display.print(f"validation loss {loss:.4f} nats per token")
        if config.sample:
            self._sample(state)
        with self.display.waiting("timing the device"):
            self._time_device(state, batch)
        return None

    def peaks(self) -> str:
        """Returns the predicted peak as text, and the runtime's peak if it reports one."""
        text, actual = f"peak {iec(self.report.peak_bytes)}", runtime_peak_bytes()
        return f"{text} predicted" if actual is None else f"{text} predicted, {iec(actual)} used"

    def _read(self, *, left: int):
        """Reads, records and shows the metrics of running steps, except for the last `left`."""
        while len(self.running) > left:
            number, metrics = self.running.popleft()
            self._record_step(number, jax.device_get(metrics))  # waits for the step

    def _record_step(self, number: int, metrics: dict[str, Any]):
        config = self.config
        before, self.since = self.since, time.perf_counter()
        # If the host is slower than the device, the last two steps are read at the same moment.
        seconds = max(self.since - before, _LEAST_SECONDS)
        self.seconds.append(seconds)
        row = {
            "step": number,
            "loss": float(metrics["loss"]),
            "gradient_norm": float(metrics["gradient_norm"]),
            "skipped": int(metrics["skipped"]),
            "step_seconds": seconds,
            "tokens_per_second": config.batch_size * config.seq_len / seconds,
            **self.flops.utilization(seconds, self.peak_flops),
        }
        actual = runtime_peak_bytes()
        if actual is not None:
            row["peak_bytes_in_use"] = actual
        self._write(row)
        self.display.step(row)
        if metrics["skipped_in_row"] >= config.max_skipped:
            raise RunError(
                f"gradients were not finite for {config.max_skipped} steps in a row, the last at "
                f"step {number}; a lower --learning-rate may help, --max-skipped sets the limit"
            )

    def _validate(self, state: TrainState, number: int) -> float:
        if number == self.config.steps:
            self.display.end_steps()
            with self.display.waiting("validating"):
                loss = self.validate(state.params)
        else:
            loss = self.validate(state.params)
            self.display.print(f"step {number}  validation loss {loss:.4f}")
        self._write({"step": number, "validation_loss": loss})
        return loss

    def _save(self, state: TrainState):
        about = about_run(self.config, self.corpus.sha256, int(state.step), self.planned_for)
        self.checkpoints.save(state, about)

    def _sample(self, state: TrainState):
        from experiments.training.sample import sample_text

        tokenizer, prompt = self.corpus.tokenizer, self.corpus.validation[: self.config.seq_len]
        text = sample_text(self.config, state.params, prompt, _SAMPLED_TOKENS, tokenizer)
        self.display.print(f"--- the model goes on after the bar ---\n{text}")

    def _time_device(self, state: TrainState, batch):
        """Records the mean time of the run's steps, and its ratio to the device's time of a step.

        The device is timed by steps that follow each other and whose metrics are not read. They
        consume `state`, so they come after the last step of the run.
        """
        timed = min(_MOST_TIMED, len(self.seconds) // _TIMED_SHARE)
        if not timed:
            return
        state, _ = jax.block_until_ready(self.step(state, batch))
        started = time.perf_counter()
        for _ in range(timed):
            state, _ = self.step(state, batch)
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - started) / timed
        over = statistics.fmean(self.seconds[_WARM_UP:]) / seconds
        of_device = {"device_step_seconds": seconds, "wall_over_device": over}
        self._write({"step": self.config.steps, **of_device})

    def _write(self, row: dict[str, Any]):
        self.record.write(row)
        if self.writer is not None:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, row["step"])


def _validator(config: TrainConfig, corpus: Corpus):
    """Returns a function from parameters to the loss on fixed validation windows."""
    batches = put_whole(held_out_batches(config, corpus), batch_sharding(config))
    step = jax.jit(make_validation_step(config))

    def validate(params) -> float:
        found = jax.device_get([step(params, batch) for batch in batches])
        losses, counts = zip(*(map(float, one) for one in found), strict=True)
        return sum(map(operator.mul, losses, counts)) / max(1, sum(counts))

    return validate


def _tensorboard(config: TrainConfig, folder: Path):
    if not config.tensorboard or not is_first():
        return None
    from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]  an extra

    return SummaryWriter(str(folder))


def peak_flops_per_second(config: TrainConfig) -> float | None:
    """Returns the bf16 peak of a run's devices; None if the chip is not in the table."""
    chip = chip_of(LOCAL)
    count = 1 if config.mesh_shape is None else config.mesh_shape.size
    return None if chip is None else count * chip.bf16_flops_per_second


def runtime_peak_bytes() -> int | None:
    """Returns the most device memory of this process; None if the runtime does not report it."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
