"""`experiments.sweep`: its rows, resuming, failing rows, and what it refuses before JAX."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cyclopts import App

from experiments.cli import main
from experiments.config import OptimizerConfig, TrainConfig
from experiments.fitting import measuring
from experiments.fitting.row import FitRow
from experiments.sweep import PLANS, sweep
from experiments.sweeping import running
from experiments.sweeping.case import flags_of
from jaxckpt.absent.launch import Processes
from jaxckpt.models.config import TransformerConfig
from tests.experiments.runs import HANG_SECONDS, wait_for
from tests.experiments.test_fit import GIB, report

ROOT = Path(__file__).parents[2]
TINY = ["--num-blocks=2", "--d-model=16", "--num-heads=2", "--num-kv-heads=1", "--head-dim=8"]
TINY += ["--d-ff=32", "--batch-size=2", "--seq-len=16", f"--data={ROOT / 'README.md'}"]
ONE = [*TINY, "--depth=2"]


@pytest.fixture
def ran(monkeypatch):
    """Records what would be run in processes of their own, and answers in their place."""
    calls = []

    def run_module(module, flags, processes):
        values = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
        values.setdefault("remat", TrainConfig().remat)
        calls.append((module.partition(".")[2], values))
        if values.get("remat") == "log":
            raise running.RowError("no\nsuch thing")
        if module == "experiments.fit":
            answer = {"rows": [{"plan": "1xfull/none"}]}
            Path(values["json"]).write_text(json.dumps(answer))
            return
        header = dict.fromkeys(("device", "backend", "memory_source"), "cpu")
        header |= {"predicted_peak_bytes": 5 * GIB, "predicted_temp_bytes": 4 * GIB}
        header |= {"versions": {}, "step_flops": 9, "recomputed_flops": 1}
        header |= {"compile_seconds": 1.5, "buffers": [{"size_bytes": 7}]}
        rows = [header] + [{"step": n, "loss": 9 - n, "step_seconds": 4 - n} for n in (1, 2, 3)]
        rows += [{"step": 3, "validation_loss": 1.0}]
        folder = Path(values["out"])
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(running, "_run_module", run_module)
    return calls


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_a_row_has_what_a_run_said(ran, tmp_path):
    main(sweep, [*TINY, "--plan=full", "--depth=2", "--depth=3", "--steps=40", f"-o={tmp_path}"])
    two, three = rows_of(tmp_path)
    assert (two["plan"], two["depth"], two["target"], three["depth"]) == ("full", 2, "local", 3)
    assert two["peak_bytes"] == 5 * GIB and two["runtime_peak_bytes"] is None
    assert two["step_seconds"] == 1.5, "the median without the first step"
    assert two["step_seconds_source"] == "measured" and two["losses"] == [8, 7, 6]
    assert two["buffers"] == [{"size_bytes": 7}] and two["versions"]["jax"]
    assert two["commit"] and two["command"].startswith("python -m experiments.sweep")
    train = "python -m experiments.train --remat=full --steps=40 --batch-size=2 --seq-len=16"
    assert f"{train} --num-blocks=2" in two["train_command"].replace(TINY[-1] + " ", "")
    (_, flags), _ = ran
    assert flags["steps"] == "10" and flags["decay-steps"] == "40" and "overwrite" in flags


def test_the_same_command_goes_on(ran, tmp_path, capsys):
    flags = [*ONE, "--plan=none", "--plan=sqrt", f"-o={tmp_path}"]
    main(sweep, flags)
    path = tmp_path / "rows.jsonl"
    done, torn = path.read_text().splitlines()
    path.write_text(f"{done}\n{torn[:100]}")  # as a killed sweep leaves it
    main(sweep, flags)
    assert [call[1]["remat"] for call in ran] == ["none", "sqrt", "sqrt"]
    assert "1 of 2 rows are done already" in capsys.readouterr().out
    assert path.read_text().splitlines()[0] == done
    assert [row["plan"] for row in rows_of(tmp_path)] == ["none", "sqrt"]
    main(sweep, [*flags, "--depth=3"])  # more rows join those of the folder
    assert [call[1]["remat"] for call in ran[3:]] == ["none", "sqrt"]
    assert [row["depth"] for row in rows_of(tmp_path)] == [2, 2, 3, 3]


def test_two_depths_are_usual_where_every_plan_fits_both(ran, tmp_path):
    main(sweep, [*TINY[1:], "--num-blocks=6", "--plan=full", f"-o={tmp_path / 'two'}"])
    assert [row["depth"] for row in rows_of(tmp_path / "two")] == [6, 3]
    main(sweep, [*TINY[1:], "--num-blocks=6", "--plan=4xfull/none", f"-o={tmp_path / 'one'}"])
    assert [row["depth"] for row in rows_of(tmp_path / "one")] == [6]
    main(sweep, [*TINY[1:], "--num-blocks=1", "--plan=full", f"-o={tmp_path / 'lone'}"])
    assert [row["depth"] for row in rows_of(tmp_path / "lone")] == [1]


def test_a_row_says_what_it_is_of_and_how_its_times_spread(ran, tmp_path):
    main(sweep, [*ONE, "--plan=full", f"-o={tmp_path}"])
    (row,) = rows_of(tmp_path)
    assert row["about"] == "a Transformer of width 16, batches of 2 x 16 tokens, adamw"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
    assert row["step_seconds_spread"] is None, "two times have no quartiles"
    assert running._middle_half([1.0, 2.0, 3.0, 4.0, 9.0]) == [2.0, 4.0]


def test_a_row_that_fails_does_not_stop_the_others(ran, tmp_path, capsys):
    flags = [*ONE, "--plan=log", "--plan=full", f"-o={tmp_path}"]
    for attempt in (1, 2):
        with pytest.raises(SystemExit) as stop:
            main(sweep, flags)
        assert stop.value.code == 1
        assert "1 of 2 rows failed" in capsys.readouterr().err
        assert [call[1]["remat"] for call in ran] == ["log", "full", "log"][: attempt + 1]
    failed = [row for row in rows_of(tmp_path) if "error" in row]
    assert {row["error"] for row in failed} == {"no such thing"} and failed[0]["plan"] == "log"


def test_a_budget_is_a_row_of_auto(ran, tmp_path):
    main(sweep, [*ONE, "--plan=auto", "--budget=1GiB", "--budget=2GiB", f"-o={tmp_path}"])
    assert [name for name, _ in ran] == ["fit", "train"] * 2
    assert ran[0][1]["budget"] == "1GiB" and ran[2][1]["budget"] == "2GiB"
    assert ran[1][1]["remat"] == "1xfull/none" and "budget" not in ran[1][1]
    one, two = rows_of(tmp_path)
    assert (one["asked"], one["budget"], one["plan"]) == ("auto", "1GiB", "1xfull/none")
    assert two["budget"] == "2GiB" and "--remat=1xfull/none" in one["train_command"]
    ran.clear()
    with pytest.raises(SystemExit):  # log fails here
        main(sweep, [*ONE, "--budget=3GiB", f"-o={tmp_path}"])
    assert len(ran) == len(PLANS) + 2, "it is added to the usual plans"


def test_an_absent_chip_is_compiled_for(monkeypatch, ran, tmp_path):
    def measure_all(cases, parallel):
        ((config, target),) = cases
        return [FitRow(config=config, target=target, report=report(3.0, seconds=0.25))]

    monkeypatch.setattr(measuring, "measure_all", measure_all)
    monkeypatch.setattr(measuring, "check_targets", lambda targets: None)
    main(sweep, [*ONE, "--plan=full", "--target=v5e-1", f"-o={tmp_path}"])
    (row,) = rows_of(tmp_path)
    assert row["step_seconds"] == 0.25 and row["step_seconds_source"] == "roofline"
    assert row["peak_bytes"] == 3 * GIB and row["usable_bytes"] == 16 * GIB and not row["losses"]
    start = "python -m experiments.fit --target=v5e-1 --plan=full --batch-size=2"
    assert row["train_command"].startswith(start) and "--data" not in row["train_command"]


def test_flags_make_the_configuration_again():
    config = TrainConfig(
        model=TransformerConfig(num_blocks=3, dropout=0.1, tied_embeddings=False, qk_norm=False),
        optimizer=OptimizerConfig(kind="lion", learning_rate=1e-4),
        data="a folder/*.txt",
        trainable=("layers/*", "norm"),
        remat="auto",
        budget="1GiB",
        pack=True,
        z_loss=1e-4,
    )
    app, found = App(), []

    @app.default
    def read(settings: TrainConfig = TrainConfig()):
        found.append(settings)

    app(flags_of(config), result_action="return_value")
    app(flags_of(TrainConfig()), result_action="return_value")
    assert found == [config, TrainConfig()] and flags_of(TrainConfig()) == []


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--plan=sqrtt"], "did you mean 'sqrt'?"),
        (["--plan=14xfull/none"], "the stack has 8"),
        (["--plan=uniform:6", "--depth=8", "--depth=4"], "the most is uniform:4"),
        (["--plan=auto"], "needs a budget: --budget=auto is all that the device can use"),
        (["--budget=16GBB"], "unit 'GBB' (did you mean 'GB'?)"),
        (["--depth=0"], "depth is 0; the least is 1"),
        (["--run-steps=0"], "run_steps is 0; the least is 1"),
        (["--target=v5f-1"], "did you mean 'v5e-1'?"),
        (["--plan=full", "--plan=full"], "given twice"),
        (["--data=README.mdd"], "did you mean 'README.md'?"),
        (["--out=x"], "--out is a flag of experiments.train; experiments.sweep has no use for it"),
        (["--resume"], "--resume"),
        (["-o=README.md"], "is a file; name a folder"),
    ],
)
def test_refused_before_anything_runs(flags, message, ran, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = [] if flags[0].startswith("-o") else [f"-o={tmp_path / 'sweep'}"]
    with pytest.raises(SystemExit) as stop:
        main(sweep, [*flags, *out])
    printed, error = capsys.readouterr()
    assert stop.value.code == 2 and message in error and not printed
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not ran and not [*tmp_path.iterdir()]


def test_usual_plans_fit_any_stack():
    for blocks in (1, 2, 7):
        model = TransformerConfig(num_blocks=blocks)
        assert all(TrainConfig(model=model, remat=plan).plan.num_blocks for plan in PLANS)


def test_a_process_that_fails_says_its_last_line(tmp_path):
    with pytest.raises(running.RowError, match=r"steps is 0; the least is 1$") as caught:
        running._run_module("experiments.train", ["--steps=0", "--debug"], Processes())
    assert "ConfigError: steps is 0" in caught.value.traceback
    assert "SIGKILL, which is what a machine without memory left" in running._reason(-9, "")
    assert running._reason(143, "") == "its process was ended by SIGTERM"
    assert running._reason(130, "") == "its process was ended by SIGINT"
    assert running._reason(1, "Traceback\nValueError: no\n") == "ValueError: no"


def test_no_jax(tmp_path):
    code = (
        "import sys\nfrom experiments.cli import main\nfrom experiments.sweep import sweep\n"
        "try:\n    main(sweep, sys.argv[1:])\nfinally:\n    print('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "--plan=2xfull", f"-o={tmp_path / 'sweep'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "False\n", done.stderr


@pytest.mark.slow
def test_a_row_that_is_stopped_is_tried_again(monkeypatch, tmp_path):
    """Its run saves what it has and ends in good order, which is not being done."""
    run, sent = Processes.run, []

    def stopped(self, command, **options):
        if sent:
            return run(self, command, **options)
        sent.append(command)
        code = (
            "from experiments.training.stopping import StopRequest as S; import os, signal, sys\n"
        )
        code += "enter = S.__enter__\n"
        code += "def now(self):\n    enter(self); os.kill(os.getpid(), signal.SIGTERM)\n"
        code += "    while not self.signal_name: pass\n    return self\n"
        code += "S.__enter__ = now\n"
        code += "from experiments.cli import main; from experiments.train import train\n"
        code += "main(train, sys.argv[1:])\n"
        return run(self, [sys.executable, "-c", code, *command[3:]], **options)

    monkeypatch.setattr(Processes, "run", stopped)
    flags = [*ONE, "--plan=full", "--run-steps=3", f"-o={tmp_path}"]
    with pytest.raises(SystemExit) as stop:
        main(sweep, flags)
    (row,) = rows_of(tmp_path)
    assert stop.value.code == 1 and row["error"] == "its process was ended by SIGTERM"
    main(sweep, flags)
    assert len(sent) == 1 and len(rows_of(tmp_path)[-1]["losses"]) == 3


def start_sweep(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.sweep", *ONE, f"-o={folder}", "--run-steps=3"]
    command += ["--plan=none", "--plan=sqrt", "--plan=names:nope", "--plan=full"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_sweep_goes_on(number, tmp_path):
    process, path = start_sweep(tmp_path), tmp_path / "rows.jsonl"
    wait_for(process, lambda: path.exists() and path.read_text().endswith("\n"))
    process.send_signal(number)
    _, error = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    assert number == signal.SIGKILL or "rows more are done, the same command goes on" in error
    before = path.read_text().splitlines()
    process = start_sweep(tmp_path)
    out, error = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 1 and "1 of 4 rows failed" in error
    assert f"{len(before)} of 4 rows are done already" in out
    assert path.read_text().splitlines()[: len(before)] == before
    rows = {row["plan"]: row for row in rows_of(tmp_path)}
    assert "matches no tag of the block" in rows.pop("names:nope")["error"]
    assert [len(row["losses"]) for row in rows.values()] == [3, 3, 3]
    assert rows["none"]["losses"] == pytest.approx(rows["full"]["losses"], rel=1e-5)
    assert rows["none"]["peak_bytes"] > 0 and rows["none"]["buffers"]
