"""`experiments.fit`: what it prints, what it writes down, and what it refuses."""

import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import threading

import pytest
from rich.console import Console

from experiments.cli import main
from experiments.config import ConfigError, TrainConfig
from experiments.fit import PLANS, fit
from experiments.fitting import measuring, table
from experiments.fitting.measuring import FitRow, largest_that_fits
from experiments.fitting.waiting import Waiting
from jaxckpt.absent import launch
from jaxckpt.compiled.buffers import Understood
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.targets.target import parse_target

GIB = 1 << 30
# Splash attention alone takes a minute to compile.
SIZES = ["--num-blocks=8", "--d-model=256", "--batch-size=64", "--seq-len=512", "--attention=plain"]


def needs_tpu():
    try:
        launch.check_available(parse_target("v5e-1"))
    except launch.Unavailable as error:
        pytest.skip(str(error))


def report(peak: float, seconds: float | None = 1.0, again: int = 0, **changes) -> MemoryReport:
    sizes = dict.fromkeys(("argument", "output", "alias", "temp", "host", "code"), 0)
    values = {f"{name}_bytes": size for name, size in sizes.items()}
    values |= {"peak_bytes": int(peak * GIB), "flops": 100 + again, "recomputed_flops": again}
    values |= {"estimated_seconds": seconds, "usable_bytes": 16 * GIB, "target": "v5e-1"}
    values |= {"source": "a test", "jax_version": "0"}
    return MemoryReport(**(values | changes))


REPORTS = {
    "none": report(20.0, seconds=1.0),
    "dots": report(15.0, seconds=1.1, again=5),
    "full": report(10.0, seconds=1.3, again=30),
}


@pytest.fixture
def measured(monkeypatch):
    """Answers of the compiler by plan, in place of compiling."""
    monkeypatch.setattr(measuring, "_measure", lambda config, *_: REPORTS[config.remat])
    monkeypatch.setattr(measuring, "check_targets", lambda *_: None)


def run(capsys, *flags: str) -> str:
    main(fit, list(flags))
    return capsys.readouterr().out


def test_the_fastest_that_fits_is_marked(measured, capsys):
    flags = [f"--plan={plan}" for plan in ("full", "none", "dots")]
    lines = run(capsys, "--target=v5e-1", *flags).splitlines()
    rows = [line.split() for line in lines if line.split()[0] in REPORTS]
    assert [row[0] for row in rows] == ["none", "dots", "full"], "by estimated time"
    assert [row[1] for row in rows] == ["too", "fastest", "fits"]
    assert " ".join(rows[2][2:]) == "10.00 GiB 6.00 GiB 30.0 % 1,300 +18.2 %"
    assert not any("host" in line or "sending" in line for line in lines), "nothing to say of them"


def test_what_a_gpu_can_use_is_a_share_of_its_memory(monkeypatch, measured, capsys):
    assert "16.00 GiB usable per device: 8 blocks" in run(capsys, "--target=v5e-1", "--plan=full")
    monkeypatch.setitem(REPORTS, "full", report(10.0, target="h100"))
    out = run(capsys, "--target=h100", "--plan=full")
    assert "usable per device (75 % of 79.11 GiB, what JAX preallocates): 8 blocks" in out


def test_colours_are_for_terminals(measured, capsys, monkeypatch):
    plans = ["--target=v5e-1", "--plan=none", "--plan=full"]
    assert "\x1b" not in run(capsys, *plans)
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = run(capsys, *plans)
    assert "\x1b[31mtoo large" in out and "\x1b[1;32mfastest" in out


def test_each_row_is_said_as_it_is_done(measured, capsys):
    main(fit, ["--target=v5e-1", "--plan=none", "--plan=full", "--parallel=1"])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "1/2  none on v5e-1: 20.00 GiB, too large",
        "2/2  full on v5e-1: 10.00 GiB, fits",
    ]
    main(fit, ["--target=v5e-1", "--plan=full"])
    assert not capsys.readouterr().err, "the table says it"


def test_ctrl_c_shows_the_rows_that_are_done(monkeypatch, measured, capsys):
    def measure(config, *_):
        if config.remat == "full":
            raise KeyboardInterrupt
        return REPORTS[config.remat]

    monkeypatch.setattr(measuring, "_measure", measure)
    with pytest.raises(SystemExit) as stop:
        main(fit, ["--target=v5e-1", "--plan=none", "--plan=full", "--parallel=1"])
    out, err = capsys.readouterr()
    assert stop.value.code == 130
    assert "none  too large" in out and "full" not in out
    end = "error: interrupted: 1 of 2 rows are done; asking again starts from these"
    assert err.splitlines()[-1] == end


def test_what_an_interrupt_ends_is_no_row(monkeypatch, measured, capsys):
    """The compilers' processes are killed, and the rows that wait for them fail."""
    begun, interrupted = threading.Event(), threading.Event()

    def measure(config, *_):
        if config.remat == "full":
            begun.set()
            assert interrupted.wait(600)
            raise RuntimeError("the process was ended by SIGKILL")
        assert begun.wait(600)
        raise KeyboardInterrupt

    stop = launch.Processes.stop

    def stopped(processes):
        stop(processes)
        interrupted.set()

    monkeypatch.setattr(launch.Processes, "stop", stopped)
    monkeypatch.setattr(measuring, "_measure", measure)
    with pytest.raises(SystemExit) as stop_of_all:
        main(fit, ["--target=v5e-1", "--plan=none", "--plan=full"])
    err = capsys.readouterr().err
    assert stop_of_all.value.code == 130 and "SIGKILL" not in err
    assert err.splitlines()[-1] == "error: interrupted: 0 of 2 rows are done"


@pytest.mark.slow
def test_a_compiler_in_this_process_does_not_hold_ctrl_c_up(tmp_path):
    """The compiler cannot be told to stop: the process leaves it behind."""
    code = (
        "import signal, sys, time\n"
        # A shell has its background jobs ignore Ctrl-C, and what they start inherits that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from experiments.cli import main\nfrom experiments.fit import fit\n"
        "from experiments.fitting import measuring\n"
        "from tests.experiments.test_fit import REPORTS\n"
        "def measure(config, *_):\n"
        "    if config.remat == 'full':\n"
        "        print('compiling', flush=True)\n"
        "        time.sleep(3600)\n"
        "    return REPORTS[config.remat]\n"
        "measuring._measure = measure\n"
        "main(fit, ['--plan=none', '--plan=full', '--parallel=1'])\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "compiling\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=600)
    assert process.returncode == 130 and "20.00 GiB" in out and "Traceback" not in err
    assert "1 of 2 rows are done" in err.splitlines()[-1]


def test_what_is_compiled_now_is_shown_on_a_terminal():
    screen = Console(file=io.StringIO(), force_terminal=True, highlight=False, width=60)
    with Waiting(3, 2, console=screen) as waiting:
        with waiting.row("none on v5e-1") as compiling, waiting.row("sqrt on local"):
            compiling("batch-size 12")
            waiting._live.refresh()
        waiting.done(FitRow(config=TrainConfig(remat="full"), target="h100", report=report(1.0)))
        waiting._live.refresh()
    text = screen.file.getvalue()
    assert re.search(r"compiling none on v5e-1: batch-size 12  \d+ s", text)
    assert "sqrt on local waits" in text and "0 of 3 rows are done" in text
    assert "1/3  full on h100: 1.00 GiB, fits" in text
    assert re.search(r"1 of 3 rows are done, about \d+ (s|min) left", text)


def test_rows_are_written_down(measured, capsys, tmp_path):
    path = tmp_path / "rows.json"
    run(capsys, "--target=v5e-1", "--plan=none", "--plan=full", f"--json={path}")
    none, full = json.loads(path.read_text())["rows"]
    assert none["peak_bytes"] == 20 * GIB and none["fits"] is False, "known though it does not fit"
    assert full["fits"] is True and full["recomputed_flops"] == 30 and full["flops"] == 130
    names = {"plan", "target", "host_bytes", "step_seconds", "compile_seconds"}
    assert names <= full.keys() and full["plan"] == "full" and full["target"] == "v5e-1"


def test_a_plan_that_saves_nothing_is_named(monkeypatch, measured, capsys):
    monkeypatch.setitem(REPORTS, "full", report(20.0, findings=("a finding; a cure",)))
    out = run(capsys, "--target=v5e-1", "--plan=none", "--plan=full", "--plan=dots")
    warnings = [line for line in out.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 2 and warnings[0].endswith("a finding; a cure")
    assert "plan 'full' saves no memory" in warnings[1]


def test_plans_that_save_nothing_are_one_warning(monkeypatch, measured, capsys):
    for plan in ("full", "dots"):
        monkeypatch.setitem(REPORTS, plan, report(20.0))
    out = run(capsys, "--target=v5e-1", "--plan=none", "--plan=full", "--plan=dots")
    (warning,) = [line for line in out.splitlines() if line.startswith("warning:")]
    assert "saves no memory" in warning and "the same holds for " in warning


def test_a_text_that_was_not_understood_is_said(monkeypatch, measured, capsys, tmp_path):
    monkeypatch.setitem(REPORTS, "full", report(10.0, understood=Understood(7, 9)))
    path = tmp_path / "rows.json"
    out = run(capsys, "--target=v5e-1", "--plan=none", "--plan=full", f"--json={path}")
    assert "warning: full on v5e-1: understood 7 of 9 lines of XLA's text" in out
    assert out.count("understood") == 1, "not of what was read whole"
    assert json.loads(path.read_text())["rows"][1]["understood"] == {"lines": 7, "of": 9}


def test_a_plan_that_cannot_be_compiled_does_not_stop_the_others(monkeypatch, capsys, tmp_path):
    def measure(config, *_):
        if config.remat == "dots":
            raise RuntimeError("no\nsuch thing")
        return REPORTS[config.remat]

    monkeypatch.setattr(measuring, "_measure", measure)
    path = tmp_path / "rows.json"
    with pytest.raises(SystemExit) as stop:
        main(fit, ["--plan=none", "--plan=dots", "--plan=full", f"--json={path}"])
    kept = json.loads(path.read_text())["rows"][1]
    assert kept["error"] == "no such thing" and ", in measure" in kept["traceback"]
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and err.endswith("error: 1 of 3 plans could not be compiled\n")
    assert "Traceback" in err and ", in measure" in err, "a fault of the program is not hidden"
    assert "error: dots on local: no such thing" in out and "full" in out


@pytest.mark.parametrize("line", [(2.0, 0.5), (0.0, 1.0), (15.5, 0.3), (3.0, 12.9), (1.0, 0.001)])
@pytest.mark.parametrize("start", [1, 8, 4000])
def test_the_largest_that_fits_is_verified_on_both_sides(line, start):
    asked = []

    def peak(size):
        asked.append(size)
        return int((line[0] + line[1] * size + 0.01 * (size % 3)) * GIB), 16 * GIB

    found = largest_that_fits(peak, start=start)
    fits = lambda size: peak(size)[0] <= 16 * GIB
    assert fits(found) and not fits(found + 1)
    assert len(asked) <= 18


def test_nothing_fits():
    assert largest_that_fits(lambda size: (20, 10), start=64) == 0


def test_a_limit_that_nobody_knows():
    with pytest.raises(ConfigError, match="--max needs a target that says what it can use"):
        largest_that_fits(lambda size: (20, None))


def test_the_largest_batch_of_each_plan(monkeypatch, capsys, tmp_path):
    cost = {"none": 3, "full": 1}

    def measure(config, *_):
        return report(1 + cost[config.remat] * config.batch_size)

    monkeypatch.setattr(measuring, "_measure", measure)
    path = tmp_path / "rows.json"
    flags = ["--plan=none", "--plan=full", "--max=batch-size", f"--json={path}"]
    out = run(capsys, "--target=local", *flags)
    rows = json.loads(path.read_text())["rows"]
    assert [row["largest"] for row in rows] == [5, 15]
    assert [row["batch_size"] for row in rows] == [5, 15] and "batch ? x 128" in out


def test_ranks_without_times_by_what_is_run_again():
    config = TrainConfig()
    rows = [
        FitRow(config=config, target="local", report=report(1.0, seconds=None, again=again))
        for again in (30, 0, 10)
    ]
    assert [row.report.recomputed_flops for row in table.ranked(rows)] == [0, 10, 30]
    unknown = dataclasses.replace(rows[0].report, usable_bytes=None)
    assert table.best([dataclasses.replace(rows[0], report=unknown)]) is None


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--target=v5f-1"], "target 'v5f-1' is not known (did you mean 'v5e-1'?)"),
        (["--target=v5e-3"], "valid: v5e-1, v5e-4, v5e-8"),
        (["--plan=sqrtt"], "(did you mean 'sqrt'?)"),
        (["--plan=40xfull/none"], "40"),
        (["--plan=full", "--plan=full"], "given twice"),
        (["--max=batch-sise"], '"batch-size"'),
        (["--parallel=0"], "the least is 1"),
        (["--json=nowhere/rows.json"], "there is no folder nowhere"),
        (["--trainable"], "--trainable"),
        (["--mesh=fsdp=8", "--target=v5e-4"], "is of 8 devices; target v5e-4 has 4 devices"),
        (["--mesh=fdsp=4", "--target=v5e-4"], "(did you mean 'fsdp'?)"),
    ],
)
def test_bad_input_is_one_line(flags, text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(fit, flags)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and text in err and not out
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_compiler_that_is_not_installed(capsys):
    try:
        launch.check_available(parse_target("h100"))
    except launch.Unavailable:
        with pytest.raises(SystemExit) as stop:
            main(fit, ["--target=h100"])
        assert stop.value.code == 2
        assert "pip install -e '.[cuda13]'" in capsys.readouterr().err
    else:
        pytest.skip("the CUDA plugin is installed")


@pytest.mark.heavy
@pytest.mark.xdist_group("absent")
def test_an_absent_chip_and_the_second_time(tmp_path):
    needs_tpu()
    plans = ["none", "full", "sqrt"]
    path = tmp_path / "rows.json"
    code = (
        "import sys\nfrom experiments.cli import main\nfrom experiments.fit import fit\n"
        "main(fit, sys.argv[1:])\nassert 'jax' not in sys.modules"
    )
    command = [sys.executable, "-c", code, *SIZES, "--target=v5e-1", f"--json={path}"]
    command += [f"--plan={plan}" for plan in plans]
    environment = {"JAXCKPT_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    found = []
    for _ in range(2):
        subprocess.run(command, check=True, env=_environment() | environment)
        found.append(json.loads(path.read_text())["rows"])
    # To the digits of the seconds that compiling took: nothing was compiled again.
    assert found[0] == found[1] and all(row["compile_seconds"] > 0 for row in found[0])
    none, full, sqrt = found[0]
    assert none["peak_bytes"] > full["peak_bytes"] > sqrt["peak_bytes"]
    assert none["recomputed_flops"] == 0 < full["recomputed_flops"] < sqrt["recomputed_flops"]
    assert all(row["fits"] and row["step_seconds"] > 0 for row in found[0])


def _environment():
    import os

    return dict(os.environ)


def test_the_usual_plans_fit_any_stack():
    for blocks in (1, 2, 7, 28):
        for plan in PLANS:
            model = dataclasses.replace(TrainConfig().model, num_blocks=blocks)
            assert dataclasses.replace(TrainConfig(), model=model, remat=plan).plan.num_blocks


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan=full"], "--calibrate times a block for the planner: it is of plan 'auto' alone"),
        (["--plan=auto", "--budget=1GiB", "--target=v5e-1"], "v5e-1 is not it"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(fit, ["--calibrate", *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


def test_a_table_for_an_absent_chip_imports_no_jax():
    """Two processes with JAX would share the memory of a present chip."""
    code = "import sys, experiments.fitting.table\nprint('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
