"""`experiments.report`: what it reads and skips, what the page holds, and what it refuses."""

import json
import re
import sys
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.config import TrainConfig
from experiments.report import report
from experiments.reporting import groups
from experiments.reporting.points import point_of_row
from tests.experiments.report_rows import MIB, PLANS, row, write

ALL = [row(plan, depth) for plan in PLANS for depth in (8, 16, 32)]


def data_of(page: Path) -> dict:
    """Returns the JSON in a page, found as a browser finds it."""
    text = page.read_text()
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(content)


def made(tmp_path: Path, *sources: Path, flags=()) -> dict:
    out = tmp_path / "report.html"
    main(report, [*map(str, sources), f"-o={out}", *flags])
    return data_of(out)


def test_the_page_holds_every_row(tmp_path, capsys):
    data = made(tmp_path, write(tmp_path / "sweep", ALL))
    assert [group["name"] for group in data["groups"]] == [
        f"local (cpu), {depth} blocks" for depth in (8, 16, 32)
    ]
    points = data["groups"][0]["points"]
    assert [point["plan"] for point in points] == ["sqrt", "full", "dots", "uniform:4", "none"]
    front = [points[place]["plan"] for place in data["groups"][0]["frontier"]]
    assert front == ["sqrt", "full", "dots", "none"]
    full = points[1]
    assert full["peak_bytes"] == 120 * MIB and full["step_seconds"] == 0.06
    assert full["recomputed"] == 0.25 and full["command"].endswith("--remat=full --num-blocks=8")
    assert [buffer["size_bytes"] for buffer in full["buffers"]] == [2 * MIB, MIB]
    assert full["buffers"][0]["source"] == "b/model.py:7", "no path of the machine it ran on"
    assert full["origin"] == "jaxckpt 0.1.0, jax 0.10.2, commit 0123456789"
    slopes = {line["plan"]: line["temp_slope"] for line in data["lines"]}
    assert slopes["full"] == pytest.approx(1) and slopes["sqrt"] == pytest.approx(0.5, abs=1e-6)
    assert data["groups"][0]["loss_difference"] == 0
    assert "15 rows shown, 0 that failed listed, 0 skipped" in capsys.readouterr().out


def test_times_are_told_apart_by_their_middle_halves(tmp_path):
    spreads = {"none": [0.04, 0.06], "full": [0.055, 0.07], "sqrt": [0.08, 0.09], "dots": None}
    rows = [row(plan, step_seconds_spread=spread) for plan, spread in spreads.items()]
    (group,) = made(tmp_path, write(tmp_path / "sweep", rows))["groups"]
    plans = [point["plan"] for point in group["points"]]
    ties = {plans[n]: [plans[m] for m in others] for n, others in enumerate(group["ties"])}
    assert ties == {"none": ["full"], "full": ["none"], "sqrt": [], "dots": []}
    assert group["points"][0]["about"].endswith("16 x 128 tokens, adamw")


def test_nothing_is_fetched(tmp_path):
    made(tmp_path, write(tmp_path / "sweep", ALL))
    text = (tmp_path / "report.html").read_text()
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import|import\(", text)
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text and "unsafe-inline" not in text


EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(1)">&amp;\u2028@DATA@'


def test_names_in_the_data_stay_data(tmp_path):
    rows = [row("full", device=EVIL, settings=EVIL, train_command=EVIL, commit=EVIL)]
    rows[0]["buffers"] = [{"size_bytes": 1, "shape": EVIL, "operation": EVIL, "source": EVIL}]
    rows.append({"key": EVIL, "plan": EVIL, "depth": 1, "target": EVIL, "error": EVIL})
    folder = write(tmp_path / "sweep", rows)
    data = made(tmp_path, folder, flags=[f"--title={EVIL}"])
    text = (tmp_path / "report.html").read_text()
    assert "<img" not in text and text.count("<script") == 2 and text.count("</script>") == 2
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text, "the title"
    (point,) = data["groups"][0]["points"]
    assert point["device"] == point["command"] == EVIL and data["failed"][0][1] == EVIL
    scripts = Path(groups.__file__).parent / "files"
    for script in scripts.glob("*.js"):
        assert not re.findall(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script.read_text()
        )


def test_broken_lines_are_named_skipped_and_counted(tmp_path, capsys):
    lines = [row("full"), '{"key": "x", "pl', "[1]", row("sqrt"), '{"a": NaN}']
    lines += [row("none") | {"peak_bytes": "many"}, row("dots") | {"plan": "dotz"}]
    folder = write(tmp_path / "sweep", lines)
    data = made(tmp_path, folder)
    out, err = capsys.readouterr()
    assert len(data["groups"][0]["points"]) == 2 and "2 rows shown" in out and "3 skipped" in out
    warnings = err.splitlines()
    assert warnings[0].endswith("lines 2, 3, 5 are no JSON object (3 skipped)")
    assert "peak_bytes is 'many'; a number of at least 1 is needed" in warnings[1]
    assert "did you mean 'dots'?" in warnings[2] and data["skipped"][0] in warnings[0]


def test_a_later_row_of_a_key_counts_and_failures_are_listed(tmp_path):
    failed = {"key": "full-8", "plan": "full", "depth": 8, "target": "local", "error": "no room"}
    rows = [failed, row("full"), row("sqrt"), failed | {"key": "log-8", "plan": "log"}]
    data = made(tmp_path, write(tmp_path / "sweep", rows))
    assert data["failed"] == [["log, 8, local", "no room"]]
    assert [point["plan"] for point in data["groups"][0]["points"]] == ["sqrt", "full"]


def write_run(folder: Path, remat: str, losses: list[float]) -> Path:
    """Writes a record as `experiments.train` does."""
    folder.mkdir(parents=True)
    header = {"versions": {"jax": "0.10.2"}, "plan": remat, "predicted_peak_bytes": 9 * MIB}
    header |= {"predicted_temp_bytes": 5 * MIB, "memory_source": "XLA", "step_flops": 9}
    header |= {"recomputed_flops": 0, "compile_seconds": 1.0, "device": "cpu", "backend": "cpu"}
    header["config"] = TrainConfig(remat=remat, out=folder).to_dict() | {"a new setting": 1}
    steps = [
        {"step": n, "loss": loss, "step_seconds": 0.1, "peak_bytes_in_use": 7 * MIB}
        for n, loss in enumerate(losses, start=1)
    ]
    lines = [header, *steps, {"step": len(losses), "validation_loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_are_rows_too(tmp_path):
    write_run(tmp_path / "runs/full", "full", [4.0, 2.0])
    write_run(tmp_path / "runs/sqrt", "8xsqrt", [4.0, 2.002])
    (tmp_path / "runs/notes").mkdir()
    data = made(tmp_path, tmp_path / "runs")
    (group,) = data["groups"]
    assert [point["plan"] for point in group["points"]] == ["full", "sqrt"]
    full = group["points"][0]
    assert full["losses"] == [4.0, 2.0] and full["runtime_bytes"] == 7 * MIB
    assert full["command"] == "python -m experiments.train --remat=full"
    assert group["loss_difference"] == pytest.approx(0.001, rel=1e-2)


def test_a_sweep_stands_for_the_runs_that_it_left(tmp_path):
    folder = write(tmp_path / "sweep", [row("full")])
    write_run(folder / "local-8-full", "full", [1.0])
    assert len(made(tmp_path, folder)["groups"][0]["points"]) == 1


def test_what_differs_in_settings_is_not_compared(tmp_path):
    rows = [row("full"), row("full", key="b", settings="--batch-size=4")]
    data = made(tmp_path, write(tmp_path / "sweep", rows))
    names = [group["name"] for group in data["groups"]]
    assert names == [
        "local (cpu), default settings, 8 blocks",
        "local (cpu), --batch-size=4, 8 blocks",
    ]


def test_the_frontier_by_brute_force():
    sizes = [(3, 5), (1, 9), (2, 9), (2, 7), (4, 5), (5, 4), (6, 8), (5, 4)]
    points = sorted(
        (point_of_row(row("full", peak_bytes=peak, step_seconds=float(s))) for peak, s in sizes),
        key=lambda point: point.peak_bytes,
    )
    found = {(points[n].peak_bytes, points[n].step_seconds) for n in groups.frontier(points)}
    beaten = lambda a, b: a != b and b[0] <= a[0] and b[1] <= a[1]
    assert found == {a for a in sizes if not any(beaten(a, b) for b in sizes)}


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_figures(kind, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the plot extra")
    path = tmp_path / f"figure.{kind}"
    made(tmp_path, write(tmp_path / "sweep", ALL), flags=[f"--figure={path}", "--title=a $x$"])
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") if kind == "png" else b"sqrt, slope 0.50" in content


def test_no_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = write(tmp_path / "sweep", ALL)
    with pytest.raises(SystemExit) as stop:
        main(report, [str(folder), f"-o={tmp_path / 'r.html'}", f"--figure={tmp_path / 'f.svg'}"])
    assert stop.value.code == 2 and not (tmp_path / "r.html").exists()
    assert capsys.readouterr().err.endswith("matplotlib: pip install -e '.[plot]'\n")


CURE = "python -m experiments.sweep -o sweeps/small makes some"


@pytest.mark.parametrize(
    "source, out, message",
    [
        ("empty", "r.html", f"empty holds no rows of a sweep and no run; {CURE}"),
        ("swep", "r.html", "did you mean"),
        ("broken", "r.html", "line 1 is no JSON object (1 skipped)"),
        ("failed", "r.html", f"all 1 rows failed; {CURE}"),
        ("blank", "r.html", "rows.jsonl is empty"),
        ("sweep", "r.htm1", "ends in '.htm1' (did you mean '.htm'?)"),
        ("sweep", "nowhere/r.html", "there is no folder"),
        (None, "r.html", f"name at least one folder of a sweep or a run; {CURE}"),
    ],
)
def test_bad_input_is_one_line(source, out, message, tmp_path, capsys):
    write(tmp_path / "sweep", [row("full")])
    write(tmp_path / "broken", ["{"])
    write(tmp_path / "blank", [""])
    write(tmp_path / "failed", [{"key": "a", "error": "no"}])
    (tmp_path / "empty").mkdir()
    named = [] if source is None else [str(tmp_path / source)]
    with pytest.raises(SystemExit) as stop:
        main(report, [*named, f"-o={tmp_path / out}"])
    printed, error = capsys.readouterr()
    assert stop.value.code == 2 and message in error and not printed
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_an_empty_folder_among_others_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    made(tmp_path, write(tmp_path / "sweep", ALL), tmp_path / "empty")
    assert "empty holds no rows of a sweep and no run" in capsys.readouterr().err
