"""`experiments.draw`: timelines are what runs, pictures are theirs, bad input is one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.executor_parts import evaluations
from experiments.cli import main
from experiments.draw import draw
from experiments.drawing.timeline import (
    BACKWARD,
    CARRY,
    FORWARD,
    RESIDUALS,
    as_text,
    timeline,
)
from jaxckpt import scan_blocks
from jaxckpt.planner.result import Candidate, FitResult, Row
from jaxckpt.plans import Plan
from tests.experiments.test_fit import report

ROOT = Path(__file__).parents[2]
ROWS = (
    Row(
        stage="12xfull",
        kept_bytes=2**20,
        held_bytes=3 * 2**20,
        none_bytes=4 * 2**20,
        seconds=1.0,
        again_seconds=0.5,
        lines="unet.py:3 to unet.py:9",
    ),
    Row(stage="5xnone", kept_bytes=2 * 2**20, none_bytes=2 * 2**20, seconds=2.0),
)
MIXED = "4xsqrt/3xuniform:2+dots/5xfull+attention/none"


def line_of(plan: str, blocks: int):
    return timeline(Plan.parse(plan).bind(blocks))


@pytest.mark.parametrize(
    "plan, blocks, evaluated, slots",
    [
        ("binomial:4", 32, 32 + 76, 5),
        ("none", 8, 8, 0),
        ("full", 8, 16, 8),
        ("uniform:4", 8, 8 + 6, 3),
        ("uniform:1", 8, 8, 0),
        ("log", 1, 2, 1),
    ],
)
def test_counts(plan, blocks, evaluated, slots):
    line = line_of(plan, blocks)
    assert (line.evaluations, line.peak_slots) == (evaluated, slots)
    assert f"evaluations {evaluated} (" in as_text(line)


def test_it_is_what_runs():
    plan = "4xsqrt/3xuniform:2/3xfull/2xnone/4xbinomial:2"
    stack = lambda block, params, carry: scan_blocks(block, params, carry, remat=plan)
    drawn = [run.block for run in line_of(plan, 16).runs if run.kind != BACKWARD]
    assert [drawn.count(block) for block in range(16)] == evaluations.count(stack, 16)


def answer(rows=ROWS) -> FitResult:
    own = report(2**-7)
    one = Candidate(
        plan=Plan.parse("full"), predicted_bytes=2**23, compiled_bytes=2**23, seconds=1.0, flops=1
    )
    return FitResult(
        plan=one.plan,
        report=own,
        budget_bytes=2**23,
        candidates=(one,),
        chosen=one,
        rows=rows,
        num_compiles=1,
        unit="MiB",
    )


def test_an_answer_is_drawn_as_what_its_stages_hold(tmp_path, capsys):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(answer().as_json()))
    main(draw, [str(path)])
    lines = capsys.readouterr().out.splitlines()
    sizes = [re.findall(r"(\S+) MiB", line) for line in lines[1:-1]]
    assert sizes == [["1.00", "4.00"], ["3.00", "6.00"], ["3.00", "6.00"], ["4.00", "4.00"]]
    assert [line.split()[:2] for line in lines[1:-1]] == [
        ["forward", "12xfull"],
        ["forward", "5xnone"],
        ["backward", "5xnone"],
        ["backward", "12xfull"],
    ]
    assert lines[1].endswith("unet.py:3 to unet.py:9")
    assert [line.count("#") for line in lines[1:3]] == [5, 16] and lines[2].count(".") > 15
    assert lines[-1].startswith("the plan holds 4.00 MiB at most in 9500.000 ms, none 6.00 MiB")
    pytest.importorskip("matplotlib")
    main(draw, [str(path), "-o", str(tmp_path / "memory.svg")])
    svg = (tmp_path / "memory.svg").read_text()
    assert "held for the backward pass, MiB" in svg and "none" in svg


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("[]", [], "is no result of jaxckpt.fit"),
        ("", [], "is no result of jaxckpt.fit"),
        (None, [], "cannot read"),
        (ROWS, ["--blocks=3"], "--blocks is for a plan"),
        ((Row(stage="8xsqrt"),), [], "draw it by its plan, such as python -m experiments.draw 8x"),
    ],
)
def test_what_is_no_answer(text, flags, message, tmp_path, capsys):
    path = tmp_path / "result.json"
    if text is not None:
        is_rows = isinstance(text, tuple)
        path.write_text(json.dumps(answer(text).as_json()) if is_rows else text)
    with pytest.raises(SystemExit):
        main(draw, [str(path), *flags])
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


STAGES = st.tuples(
    st.integers(1, 9),
    st.sampled_from(["none", "full", "uniform", "every", "sqrt", "log", "binomial"]),
    st.integers(1, 9),
)


@settings(max_examples=60)
@given(st.lists(STAGES, min_size=1, max_size=4))
def test_every_plan_is_drawn_in_a_legal_order(stages):
    numbered = ("uniform", "every", "binomial")
    words = [f"{n}x{w}" + f":{min(n, k)}" * (w in numbered) for n, w, k in stages]
    blocks = sum(n for n, *_ in stages)
    line = line_of("/".join(words), blocks)
    back = [run.block for run in line.runs if run.kind == BACKWARD]
    assert back == list(range(blocks))[::-1]
    forward = [run for run in line.runs if run.kind == FORWARD]
    assert [run.block for run in forward] == list(range(blocks)) and forward[-1].stop == (
        line.loss_time
    )
    now = 0
    for run in line.runs:  # one after another, and a backward pass right behind its residuals
        assert run.start == now
        now = run.stop
    for block in range(blocks):
        start = next(run.start for run in line.runs if (run.block, run.kind) == (block, BACKWARD))
        last = [r.stop for r in line.runs if r.block == block and r.kind != BACKWARD][-1]
        waits = [s for s in line.held if (s.block, s.kind, s.stop) == (block, RESIDUALS, start)]
        assert last == start or [wait.start for wait in waits] == [last]
    carries = [span for span in line.held if span.kind == CARRY]
    most = max((sum(s.start <= t < s.stop for s in carries) for t in range(now)), default=0)
    assert most == line.peak_slots


def test_text_of_a_small_schedule():
    lines = as_text(line_of("binomial:2", 4)).splitlines()
    assert lines[:5] == [
        "binomial:2 on 4 blocks",
        "3    F|RBB",
        "2   F |    RBB",
        "1  F--|---R---RBB",
        "0 F---|----------RBB",
    ]
    assert lines[6].startswith("evaluations 9 (4 + 5 extra forwards); peak slots 3")


def test_long_and_deep_ones_are_drawn_to_scale():
    lines = as_text(line_of("log", 300)).splitlines()
    assert max(map(len, lines[1:62])) < 210 and "a column is" in lines[-2]


@pytest.mark.parametrize("columns", [30, 50, 80, 140])
@pytest.mark.parametrize("plan, blocks", [("binomial:4", 32), (MIXED, 16), ("log", 300)])
def test_a_terminal_gets_a_picture_of_its_width(plan, blocks, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    main(draw, [plan, f"--blocks={blocks}"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns and title.endswith(f" on {blocks} blocks")
    picture = [line for line in lines if re.match(r" *\d+ [FRB=| -]*$", line)]
    assert len(picture) >= min(blocks, 60)
    end = line_of(plan, blocks).end  # as wide as whole units of time to a column allow
    assert max(map(len, picture)) > min(end, columns / 2)
    is_scaled = end > columns
    assert bool(re.search("a column is [0-9]+ units? of time", " ".join(lines))) == is_scaled


def test_policies_are_said_in_words():
    found = as_text(line_of(MIXED, 16))
    assert "blocks 4 to 6: dots: matmul outputs are kept; the rest of a recorded block" in found
    assert "blocks 7 to 11: attention: what the attention kernel's backward needs" in found
    assert "pinned host memory" in as_text(line_of("sqrt+offload:carry", 9))


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_figures(kind, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the plot extra")
    path = tmp_path / f"plan.{kind}"
    main(draw, [MIXED, "--blocks=16", f"-o={path}"])
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") if kind == "png" else b"recomputed" in content
    if kind == "svg":
        for part in (b"4xsqrt/3xuniform:2+dots", b"evaluations 27", b"#e69f00", b"#0072b2"):
            assert part in content
    main(draw, [MIXED, "--blocks=16", f"-o={path}"])
    assert path.read_bytes() == content and [*tmp_path.iterdir()] == [path]


# Each picture of the documentation: its file, the plan it shows, the number of blocks.
PICTURES = {
    "none": ("none", 16),
    "full": ("full", 16),
    "uniform4": ("uniform:4", 16),
    "sqrt": ("sqrt", 16),
    "binomial4": ("binomial:4", 16),
    "8xfull_none": ("8xfull/none", 16),
    "uniform3_names": ("uniform:3+names:@tanh.1", 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_of_the_documentation_are_current(name, tmp_path):
    """By their words and counts; how they are drawn depends on matplotlib's version."""
    pytest.importorskip("matplotlib", reason="figures need the plot extra")
    plan, blocks = PICTURES[name]
    main(draw, [plan, f"--blocks={blocks}", f"-o={tmp_path / 'plan.svg'}"])
    shown = ROOT / "docs" / "drawn" / f"{name}.svg"
    new, old = (
        re.findall("<text[^>]*>([^<]*)<", p.read_text()) for p in (tmp_path / "plan.svg", shown)
    )
    assert {path.stem for path in shown.parent.glob("*.svg")} == PICTURES.keys() | {
        "function_memory"
    }
    assert new == old and any("evaluations" in words for words in old)


def test_no_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        main(draw, ["sqrt", f"-o={tmp_path / 'plan.svg'}"])
    error = "error: figures need matplotlib: pip install -e '.[plot]'\n"
    assert stop.value.code == 2 and capsys.readouterr().err == error and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["sqrtt"], "did you mean 'sqrt'?"),
        (["auto"], "auto has no schedule of its own; draw the plan that it chose"),
        (["sqrt", "--blocks=0"], "blocks is 0; the least is 1"),
        (["binomial:9", "--blocks=8"], "the most is binomial:8"),
        (["binomial:1", "--blocks=2000"], "runs 2,001,001 blocks, a picture shows 100,000 at most"),
        (["sqrt", "-o=plan.sgv"], "ends in '.sgv' (did you mean '.svg'?); valid: .txt, .svg, .png"),
        (["sqrt", "-o=nowhere/plan.svg"], "there is no folder nowhere"),
        ([], "PLAN is missing: A checkpointing plan, such as binomial:4."),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(draw, flags)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and message in err and not out
    assert err.startswith("error: ") and err.count("\n") == 1


def test_text_needs_no_jax(tmp_path):
    path = tmp_path / "plan.txt"
    code = (
        "import sys\nfrom experiments.cli import main\nfrom experiments.draw import draw\n"
        "main(draw, sys.argv[1:])\nprint('jax' in sys.modules, 'matplotlib' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "binomial:4", f"-o={path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr
    assert path.read_text().startswith("binomial:4 on 32 blocks\n31 ")
