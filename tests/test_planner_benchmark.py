"""`python -m benchmarks.planner`: its bounds on doctored rows, what it refuses, how it goes on."""

import json
import sys

import pytest

from benchmarks import cases
from benchmarks import planner as command
from benchmarks.planner_parts.bounds import check, figures, line, summaries
from benchmarks.record import rows_of
from experiments.cli import main
from jaxckpt.absent import launch
from jaxckpt.targets.target import parse_target

GIB = 1 << 30


def row(place: int, peak: float, **changes) -> dict[str, object]:
    """Returns a row that keeps every promise; the budget is a little above the peak."""
    found = {"part": "v5e-1-8x1024", "place": place, "budgets": 3, "plan": f"{3 - place}xnone/full"}
    found |= {"budget_bytes": int((peak + 0.1) * GIB), "compiled_bytes": int(peak * GIB)}
    found |= {"predicted_bytes": int(peak * 1.005 * GIB), "recomputed_flops": place * 10}
    found |= {"fixed_plan": "full", "fixed_recomputed_flops": 20, "compiles": 5}
    return found | {"planning_seconds": 2.0} | changes


def rows(**changes) -> list[dict[str, object]]:
    """Returns three rows; `changes` are of the second."""
    return [row(0, 9.0), row(1, 7.0, **changes), row(2, 5.0)]


def test_what_keeps_every_promise():
    assert check(rows()) == []
    (text,) = summaries(rows())
    assert "3 of 3 budgets; predictions off by 0.50% in the median" in text
    assert "7.000 GiB compiled" in line(rows()[1])
    assert [one["failures"] for one in figures(rows())] == [""]


def test_what_fails_is_in_the_tables_row():
    (one,) = figures(rows(compiles=7))
    assert one["compiles"] == "7" and one["failures"].endswith("7 compilations, bound 6")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget_bytes": 6 * GIB}, "the compiled peak is above the budget"),
        ({"predicted_bytes": int(7.2 * GIB)}, "predicted off by 2.86%, bound 2%"),
        ({"compiles": 7}, "7 compilations, bound 6"),
        ({"recomputed_flops": 21}, "recomputes more than full, which fits"),
        ({"compiled_bytes": 4 * GIB, "predicted_bytes": 4 * GIB}, "the peak grows as the budget"),
    ],
)
def test_each_promise_is_checked(changes, message):
    assert any(message in failure for failure in check(rows(**changes)))


def test_the_median_and_the_top_are_checked():
    off = [row(n, 9.0 - n, predicted_bytes=int(1.015 * (9.0 - n) * GIB)) for n in range(3)]
    (failure,) = check(off)
    assert "predicted off by 1.50% in the median, bound 1%" in failure
    (failure,) = check([row(0, 9.0, recomputed_flops=1), row(1, 7.0)])
    assert "at the budget of none, 3xnone/full recomputes" in failure


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--part=v5e", "part is 'v5e'; valid: v5e-1-8x1024"),
        ("--budgets=1", "budgets is 1; the least is 2"),
        ("--budget=3", "--budget"),
    ],
)
def test_bad_input(flag, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command.planner, [flag])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


def test_a_run_goes_on_where_it_was_cut_short(monkeypatch, tmp_path, capsys):
    asked = []

    def run(module, case, done, *, environment):
        asked.append(list(done))
        yield from (row(n, 9.0 - n) for n in range(3) if n not in done)

    monkeypatch.setattr(command, "rows_of", run)
    monkeypatch.setattr(launch, "check_available", lambda target: None)
    output = tmp_path / "rows.json"
    flags = ["--part", "v5e-1-8x1024", "--budgets", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["", *flags])

    def planned() -> int:
        with pytest.raises(SystemExit) as stop:
            main(command.planner)
        return stop.value.code

    assert planned() == 0 and len(json.loads(output.read_text())["rows"]) == 3
    record = json.loads(output.read_text())
    assert record["command"].endswith(f"planner --part v5e-1-8x1024 --budgets 3 --output {output}")
    record["rows"].pop()
    record["rows"][0]["sources"] = "another planner's"
    output.write_text(json.dumps(record))
    assert planned() == 0 and asked == [[], [1]]
    assert len(json.loads(output.read_text())["rows"]) == 3
    monkeypatch.setattr(command, "check", lambda rows: ["a bound fails"])
    assert planned() == 1 and asked == [[], [1]]  # nothing is left to ask for
    assert "a bound fails" in capsys.readouterr().out


def test_a_part_that_fails_ends_with_its_error(monkeypatch, capsys):
    failed = {"error": "RuntimeError: out of memory", "traceback": "all of it"}
    monkeypatch.setattr(command, "rows_of", lambda *asked, environment: iter([row(0, 9.0), failed]))
    monkeypatch.setattr(launch, "check_available", lambda target: None)
    with pytest.raises(SystemExit) as stop:
        main(command.planner, ["--part=v5e-1-8x1024"])
    assert stop.value.code == 1
    assert "v5e-1-8x1024: RuntimeError: out of memory" in capsys.readouterr().out


@pytest.mark.heavy
@pytest.mark.xdist_group("absent")
def test_a_tiny_model_on_a_chip_that_is_not_here(monkeypatch, tmp_path):
    try:
        launch.check_available(parse_target("v5e-1"))
    except launch.Unavailable as error:
        pytest.skip(str(error))
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))
    case = cases.tiny(command.PARTS["v5e-1-8x1024"]) | {"budgets": 3}
    environment = launch.environment(parse_target("v5e-1"))
    found = list(rows_of("planner_parts.process", case, [1], environment=environment))
    assert [one["place"] for one in found] == [0, 2]
    assert all(one["compiled_bytes"] <= one["budget_bytes"] for one in found)
    assert found[0]["recomputed_flops"] == 0 and found[0]["compiles"] <= 6
