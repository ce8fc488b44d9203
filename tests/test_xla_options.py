"""The benchmark of XLA's options: what is timed when, and what is told of it."""

import json
import os
import sys

import pytest

from benchmarks import xla_options as benchmark
from experiments.cli import main


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """The rows say which GPU."""
    monkeypatch.setattr(benchmark, "gpu", lambda: "GPU 0")


def timed(seconds: dict, asked: list):
    """Returns what stands for a process that times the step under the options it is given."""

    def rows_of(module, case, *, environment):
        assert module == "step_jax"
        name = environment["XLA_FLAGS"].removeprefix(os.environ.get("XLA_FLAGS", "")).strip()
        asked.append(name)
        if name not in seconds:
            yield {"error": f"Unknown flag in XLA_FLAGS: {name}", "traceback": ""}
            return
        yield {
            **{"seconds": seconds[name], "peak_bytes": 2**30, "compile_seconds": 1.0},
            **{"device": "gpu (NVIDIA H200)", "versions": {"jax": "1"}},
        }

    return rows_of


def test_the_step_without_options_is_timed_before_and_after(monkeypatch, tmp_path, capsys):
    asked, output = [], tmp_path / "options.json"
    monkeypatch.setattr(benchmark, "rows_of", timed({"": 0.1, "--b=1": 0.09}, asked))
    with pytest.raises(SystemExit) as ended:
        benchmark.xla_options(option=("--a=1", "--b=1"), output=output)
    assert ended.value.code == 0 and asked == ["", "--a=1", "--b=1", ""]
    rows = json.loads(output.read_text())["rows"]
    assert [row["options"] for row in rows] == asked
    assert "Unknown flag" in rows[1]["error"]
    out = capsys.readouterr().out
    assert "-10.0% --b=1" in out and "without options: 100.0 ms" in out
    asked.clear()
    with pytest.raises(SystemExit):
        benchmark.xla_options(option=("--a=1", "--b=1"), output=output)
    assert asked == []  # a resumed run has nothing left
    flags = ["--option=--b=1", "--tiny", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["", *flags])
    with pytest.raises(SystemExit):
        main(benchmark.xla_options)
    assert asked == ["", "--b=1", ""]  # another model's rows are not this one's
    command = json.loads(output.read_text())["command"]
    assert command.endswith(f"xla_options --option=--b=1 --tiny --output {output}")


def test_every_few_options_the_step_is_timed_without():
    turns = list(benchmark._turns([f"--o{n}" for n in range(6)]))
    assert [place for place, one in enumerate(turns) if one == ""] == [0, 5, 8]
    assert len(turns) == 9


def test_a_run_in_which_nothing_could_be_timed_fails(monkeypatch):
    monkeypatch.setattr(benchmark, "rows_of", timed({}, []))
    with pytest.raises(SystemExit) as ended:
        benchmark.xla_options(option=("--a=1",))
    assert ended.value.code == 1


def test_a_mistyped_flag_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(benchmark.xla_options, ["--optoin", "--a=1"])
    assert ended.value.code == 2
    assert "--optoin" in capsys.readouterr().err


def test_another_plan_is_recorded_and_a_mistyped_one_is_refused(monkeypatch, tmp_path, capsys):
    asked, output = [], tmp_path / "options.json"
    monkeypatch.setattr(benchmark, "rows_of", timed({"": 0.1, "--a=1": 0.09}, asked))
    flags = ["--option=--a=1", "--plan=offload:q", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["", *flags])
    with pytest.raises(SystemExit):
        main(benchmark.xla_options)
    record = json.loads(output.read_text())
    assert record["command"].endswith(f"--option=--a=1 --plan=offload:q --output {output}")
    assert {row["case"]["plan"] for row in record["rows"]} == {"offload:q"}
    asked.clear()
    with pytest.raises(SystemExit) as ended:
        main(benchmark.xla_options, ["--plan=sqrtt"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and asked == []
    assert error.startswith("error: plan") and error.count("\n") == 1
