"""`python -m benchmarks.loops`: its rows in small form, its bounds, its exit codes, its table."""

import json

import pytest

from benchmarks import loops, tables
from experiments.cli import main


@pytest.mark.slow
def test_a_small_run_leaves_its_rows(tmp_path, capsys):
    output = tmp_path / "loops.json"
    flags = ["--length=20", "--side=8", "--method=sqrt", "--method=uniform", "--method=binomial:16"]
    with pytest.raises(SystemExit) as exit:
        main(loops.loops, [*flags, f"--output={output}"])
    record = json.loads(output.read_text())
    assert exit.value.code == 0, record["failures"]
    assert {"commit", "versions", "device", "command"} <= set(record)
    names = [(row["model"], row["method"]) for row in record["rows"]]
    methods = ("plain", "sqrt", "uniform:4", "binomial:16")
    assert names == [(model, method) for model in loops.MODELS for method in methods]
    for row in record["rows"]:
        assert row["error_of_gradients"] <= 1e-6 and row["temp_bytes"] > 0 and row["seconds"] > 0
    counts = {row["method"]: row["evaluations"] for row in record["rows"]}
    # The schedules' own numbers: two levels of 5 segments, 4 segments, and 16 states.
    assert counts == {"plain": 20, "sqrt": 52, "uniform:4": 35, "binomial:16": 43}
    assert "binomial:16" in capsys.readouterr().out


def row(method: str, **changes):
    return {
        **{"model": "rnn", "length": 64, "options": "", "method": method, "device": "gpu (X)"},
        **{"error_of_gradients": 0.0, "temp_bytes": 100, "seconds": 1.0, "cpu_seconds": 1.0},
        **{"compile_cpu_seconds": 1.0, "evaluations": None, "compile_seconds": 1.0},
    } | changes


def test_each_bound_can_fail():
    hand, rival = row("nested by hand"), row("equinox, 16 states")
    good = [row("sqrt"), row("binomial:16", seconds=0.4, compile_cpu_seconds=0.6)]
    assert loops.failed([hand, rival, *good]) == []
    of_gradients = row("sqrt", error_of_gradients=1e-5)
    assert "gradients off by 1.0e-05" in loops.failed([hand, rival, of_gradients])[0]
    slow = row("binomial:16", seconds=0.5, temp_bytes=101, compile_cpu_seconds=0.7)
    found = "\n".join(loops.failed([hand, rival, slow]))
    assert "1.01 of the temporaries" in found and "0.50 of the time" in found
    assert "0.70 of the compile time" in found
    for changes, said in (({"seconds": 1.1}, "1.10 of the time"), ({"temp_bytes": 200}, "2.00 of")):
        assert said in loops.failed([hand, row("sqrt", **changes)])[0]
    # Of the two plans as fast as hand-nested scans the leaner one counts.
    pair = [row("sqrt", temp_bytes=200), row("uniform:8")]
    assert loops.failed([hand, *pair]) == []
    on_cpu = {"device": "cpu (x)", "cpu_seconds": 0.6, "compile_cpu_seconds": 0.6}
    assert loops.failed([rival | {"device": "cpu (x)"}, row("binomial:16", **on_cpu)]) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--method=sqrtt"], "sqrt"), (["--length=0"], "at least 1"), (["--modl=rnn"], "--modl")],
)
def test_bad_input(flags, said, capsys):
    with pytest.raises(SystemExit) as exit:
        main(loops.loops, flags)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_pages_table_has_every_method():
    text = tables.loops()
    for method in ("plain", "nested by hand", "equinox, 16 states", "sqrt", "log", "binomial:16"):
        assert f"| rnn | 4096 | {method} |" in text and f"| reaction | 1000 | {method} |" in text
