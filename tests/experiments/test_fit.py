"""`experiments.fit`: what it prints, what it writes down, and what it refuses."""

import dataclasses
import json
import subprocess
import sys

import pytest

from experiments.cli import main
from experiments.config import ConfigError, TrainConfig
from experiments.fit import PLANS, fit
from experiments.fitting import measuring, table
from experiments.fitting.measuring import FitRow, largest_that_fits
from jaxckpt.absent import launch
from jaxckpt.compiled.report import MemoryReport
from jaxckpt.compiled.understood import Understood
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
    ends = [" ".join(row[-3:]) for row in rows]
    assert [end == "fastest that fits" for end in ends] == [False, True, False]
    assert ends[0] == "does not fit"
    assert rows[2][1:7] == ["10.00", "-", "6.00", "30.0", "%", "1300.0"]


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
