"""The order of a run's events: what is dispatched, put and read, and what a stop leaves behind."""

import contextlib
import dataclasses
import json
import signal
import types

import jax
import numpy as np
import pytest

from experiments.config import RunError, TrainConfig
from experiments.data import Corpus
from experiments.processes import join as processes
from experiments.training import loop
from experiments.training.checkpoints import Checkpoints
from jaxckpt.models import TransformerConfig

pytestmark = pytest.mark.slow

MODEL = TransformerConfig(
    num_blocks=2, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32, dropout=0.1
)
CONFIG = TrainConfig(
    model=MODEL, batch_size=2, seq_len=16, validation_batches=1, remat="full", max_skipped=3
)
COMPILED = []


@dataclasses.dataclass
class Watched:
    """A loss that says when it is read, which the host has to wait for.

    Attributes:
      ready: When its step is done, by the clock of `watch`.
    """

    number: int
    value: jax.Array
    ready: float
    watch: "Watch"

    def __array__(self, *_, **__):
        self.watch.events.append(f"read {self.number}")
        self.watch.seconds = max(self.watch.seconds, self.ready)
        return np.asarray(self.value)


class Watch:
    """Runs training with its events on record.

    Attributes:
      events: `put 3` is the batch of step 3, `step 3` its dispatch, `read 3` that of its metrics.
      stop_in: The step during whose dispatch the run is asked to stop.
      not_finite_from: The first step whose loss is not finite.
      seconds: What the host's clock shows. The device takes 10 s a step, one after the other; to
        put a batch takes the host 4 s.
      ready: When the device is done with all that was dispatched.
    """

    def __init__(self, monkeypatch, folder):
        self.folder, self.events, self.seconds, self.ready = folder, [], 0.0, 0.0
        self.stop_in, self.not_finite_from = None, 10**9
        self.stop = types.SimpleNamespace(signal_name=None)
        self._compile, self._put = loop._compile, loop.put_batch
        monkeypatch.setattr(loop, "StopRequest", lambda: contextlib.nullcontext(self.stop))
        clock = types.SimpleNamespace(perf_counter=lambda: self.seconds)
        monkeypatch.setattr(loop, "time", clock)
        monkeypatch.setattr(jax, "block_until_ready", self.waited)
        monkeypatch.setattr(loop, "put_batch", self.put)
        monkeypatch.setattr(loop, "_compile", self.compiled)
        for name in ("_validate", "_save"):
            monkeypatch.setattr(loop._Training, name, self.logged(name))

    def run(self, **changes) -> int | None:
        tokens = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
        halves = {"train": tokens[:3000], "validation": tokens[3000:]}
        corpus = Corpus(**halves, sha256="0" * 64, name="random")
        config = dataclasses.replace(CONFIG, out=self.folder, **changes)
        self.folder.mkdir()
        return loop.run(config, corpus, self.folder)

    def put(self, batches, step, where):
        self.events.append(f"put {step + 1}")
        self.seconds += 4
        return self._put(batches, step, where)

    def compiled(self, *args):
        # One program serves all runs here: only the decay of the learning rate would differ.
        COMPILED[:] = COMPILED or self._compile(*args)
        step, *rest = COMPILED
        numbers = iter(range(1, 10**9))
        not_finite_in_row = 0

        def watched(state, batch):
            nonlocal not_finite_in_row
            number = next(numbers)
            self.events.append(f"step {number}")
            self.ready = max(self.ready, self.seconds) + 10
            if number == self.stop_in:
                self.stop.signal_name = "SIGINT"
            state, metrics = step(state, batch)
            not_finite_in_row += number >= self.not_finite_from
            loss = Watched(number, metrics["loss"], self.ready, self)
            return state, metrics | {"loss": loss, "skipped_in_row": not_finite_in_row}

        return watched, *rest

    def waited(self, tree):
        self.seconds = max(self.seconds, self.ready)
        return tree

    def logged(self, name: str):
        method = getattr(loop._Training, name)

        def logs(training, *args):
            self.events.append(name.strip("_"))
            return method(training, *args)

        return logs

    def rows(self) -> list[dict]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines][1:]

    def saved(self) -> int | None:
        with contextlib.closing(Checkpoints(self.folder, keep=1)) as checkpoints:
            return checkpoints.latest()


@pytest.fixture
def watch(monkeypatch, tmp_path):
    return Watch(monkeypatch, tmp_path / "run")


def words(text: str) -> list[str]:
    """Returns events from a text, one of them after each comma."""
    return [event.strip() for event in text.replace("\n", " ").split(",")]


def test_the_next_step_is_dispatched_and_a_batch_put_before_metrics_are_read(watch):
    assert watch.run(steps=4) is None
    assert watch.events == words("""put 1, step 1, put 2, step 2, put 3, read 1, step 3, put 4,
        read 2, step 4, put 5, read 3, read 4, validate""")
    assert [row["step"] for row in watch.rows()] == [1, 2, 3, 4, 4]


def test_a_validation_and_a_save_wait_for_their_own_step(watch):
    assert watch.run(steps=5, validate_every=2, save_every=3) is None
    assert watch.events == words("""put 1, step 1, put 2, step 2, put 3, read 1, read 2, validate,
        step 3, put 4, read 3, save, step 4, put 5, read 4, validate,
        step 5, put 6, read 5, validate, save""")
    assert watch.saved() == 5


def test_a_stop_saves_the_last_step_that_runs_once_it_is_read(watch):
    watch.stop_in = 3
    assert watch.run(steps=9) == signal.SIGINT
    assert watch.events[-5:] == words("step 3, put 4, read 2, read 3, save")
    assert watch.saved() == 3
    assert [row["step"] for row in watch.rows()] == [1, 2, 3]


@pytest.mark.parametrize("save_every", [0, 1, 5, 6])
def test_nothing_is_saved_once_gradients_stay_non_finite(save_every, watch):
    """The third step in a row that is not finite is step 5; step 6 may be on its way by then."""
    watch.not_finite_from = 3
    with pytest.raises(RunError, match="for 3 steps in a row, the last at step 5;"):
        watch.run(steps=9, save_every=save_every)
    assert [row["step"] for row in watch.rows()] == [1, 2, 3, 4, 5]
    assert watch.events[-1] == "read 5" and "step 7" not in watch.events
    assert watch.saved() == (4 if save_every == 1 else None)


def test_the_record_compares_wall_time_with_the_device_alone(watch):
    """By the clock of `Watch`: what the host takes for batches is hidden behind the device."""
    watch.run(steps=60, validate_every=7)
    *rows, last = watch.rows()
    # Three of the four steps that follow the end are timed.
    assert watch.events[-4:] == words("step 61, step 62, step 63, step 64")
    assert last == {"step": 60, "device_step_seconds": 10.0, "wall_over_device": 1.0}
    steps = [row for row in rows if "loss" in row]
    assert [row["step_seconds"] for row in steps] == [10.0] * 60
    assert {row["tokens_per_second"] for row in steps} == {3.2}


def test_the_record_shows_a_device_that_waits(watch, monkeypatch):
    """The twin: a batch that is put once the device is done."""
    put = watch.put

    def slow_put(*args):
        watch.waited(None)
        return put(*args)

    monkeypatch.setattr(loop, "put_batch", slow_put)
    watch.run(steps=60)
    # The last step is done by the time that the one before it is read.
    of_steps = [14.0] * 57 + [1e-6]
    assert watch.rows()[-1]["wall_over_device"] == pytest.approx(sum(of_steps) / 58 / 10)


def test_a_short_run_does_not_time_the_device(watch):
    watch.run(steps=19)
    assert watch.events[-1] == "validate" and "wall_over_device" not in watch.rows()[-1]


def test_a_flag_of_any_process_is_known_one_question_later(monkeypatch):
    """With several processes nobody waits for the answer."""
    flag = processes.SharedFlag()
    assert [flag.anywhere(one) for one in (False, True, False)] == [False, True, False]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    flag = processes.SharedFlag()
    asked = (False, True, False, False)
    assert [flag.anywhere(one) for one in asked] == [False, False, True, False]
