"""`python -m benchmarks.rivals`: its fixed plans, bounds on doctored rows, what it refuses."""

import json
import sys

import pytest

from benchmarks import cases as plans
from benchmarks import rivals as command
from benchmarks.rivals_parts import bounds
from experiments.cli import main

GIB = 1 << 30
TINY_SHAPE = plans.tiny(command.SHAPES["8x1024"]) | {"budgets": 2, "rounds": 3}
KEPT = plans.canonical(plans.MAXTEXT["minimal_with_context"])


def plan(ms: float, gib: float, *, maxtext=(), is_fixed=True) -> dict[str, object]:
    found = {"seconds": ms / 1e3, "peak_bytes": int(gib * GIB)}
    return found | {"maxtext": list(maxtext), "is_fixed": is_fixed}


def row(ours: float, **changes) -> dict[str, object]:
    """Returns a shape of two budgets: `none`'s, and one within which the planner's own fits."""
    found = {
        "none": plan(77, 19),
        KEPT: plan(79, 15, maxtext=["minimal_with_context"]),
        "attention": plan(90, 10.5),
        "full": plan(100, 9, maxtext=["full"]),
        "14xattention/none": plan(ours, 12, is_fixed=False),
    }
    budgets = [
        {"budget_bytes": 19 * GIB, "plan": "none", "compiled_bytes": 19 * GIB},
        {"budget_bytes": 13 * GIB, "plan": "14xattention/none", "compiled_bytes": 12 * GIB},
    ]
    about = {"rounds": 7, "left_out": [], "is_whole": True, "device": "gpu", "compiles": 9}
    return about | {"budgets": budgets, "plans": found} | changes


def test_ours_is_held_against_what_fits():
    top, low = bounds.compared(row(85))
    assert (top["plan"], top["best fixed"], top["of best fixed"]) == ("none", "none", 1.0)
    assert top["best of MaxText"] == "minimal_with_context"
    assert top["gain"] == pytest.approx(79 / 77)
    assert low["best fixed"] == "attention" and low["its ms"] == pytest.approx(90)
    assert low["of best fixed"] == pytest.approx(85 / 90)
    assert low["best of MaxText"] == "full" and low["gain"] == pytest.approx(100 / 85)
    assert bounds.check({"8x1024": row(85)}) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (row(91), "13.000 GiB: 14xattention/none takes 1.011 of attention, bound 1.01"),
        (row(91), "at most 1.099 times as fast as the best of MaxText's, bound 1.1"),
        (row(85, rounds=0), "no budget was timed"),
        (row(85, error="8x1024: died"), "8x1024: died"),
        (row(85, budgets=[{"budget_bytes": 9 * GIB, "error": "least"}]), "no plan, but full fits"),
    ],
)
def test_each_bound_is_checked(changed, message):
    assert any(message in failure for failure in bounds.check({"8x1024": changed}))


def test_a_plan_above_its_budget_and_one_that_failed():
    changed = row(85)
    changed["budgets"][1]["compiled_bytes"] = 13 * GIB + 1
    assert any("more than the budget" in text for text in bounds.failures(changed))
    changed = row(85)
    changed["plans"]["attention"]["error"] = "out of memory"
    assert bounds.compared(changed)[1]["best fixed"] == "full"
    assert "attention: out of memory" in bounds.result("8x1024", changed).notes


def test_maxtext_is_mapped_onto_tags_of_the_model():
    import jax

    import jaxckpt
    from benchmarks.cases import TINY
    from experiments.config import TrainConfig
    from experiments.training.build import abstract_block, build
    from experiments.training.step import resolve_model

    found = plans.fixed()
    assert set(plans.MAXTEXT) == {name for names in found.values() for name in names}
    assert found["names:q,k,v,mid"] == ("save_dot_except_mlp", "save_dot_except_mlpwi")
    assert list(found)[-2:] == ["offload:q,k,v", "offload:q,k,v,mid,gate,up"]
    config, _ = resolve_model(TrainConfig(model=TINY, batch_size=2, seq_len=64))
    block, params_i, x, *consts = abstract_block(config, build(config, "local").args[0].params)
    kept = lambda text: jaxckpt.explain(block, params_i, x, *consts, plan=text).saved_bytes
    base, row_bytes = kept("full"), 2 * 64 * 4  # tokens, float32
    heads = (TINY.num_heads + 2 * TINY.num_kv_heads) * TINY.head_dim
    assert kept(plans.MAXTEXT["save_qkv_proj"]) - base == row_bytes * heads
    assert kept(plans.MAXTEXT["save_out_proj"]) - base == row_bytes * TINY.d_model
    # All projections: what JAX's own policy keeps of products without batch dimensions.
    assert kept(plans.MAXTEXT["minimal"]) == kept("dots_no_batch")
    more = kept(plans.MAXTEXT["minimal_with_context"]) - kept(plans.MAXTEXT["minimal"])
    assert more == kept("attention") - base > 0
    assert jax.default_backend() == "cpu"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "8x1042"], "shape is '8x1042'; valid: 8x1024, 2x16384 (did you"),
        (["--budgets", "1"], "budgets is 1; the least is 2"),
        (["--minutes", "0"], "--minutes is 0.0; it is more than 0"),
        (["--shapes", "8x1024"], "--shapes"),
    ],
)
def test_bad_input(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command.rivals, flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


def test_a_run_goes_on_where_it_was_cut_short(monkeypatch, tmp_path, capsys):
    asked, fates = [], {}

    def run(module, case, seconds):
        name = f"{case['batch_size']}x{case['seq_len']}"
        asked.append((name, seconds is not None))
        yield {"says": "compiled"}
        yield row(85, rounds=0, is_whole=False)
        if fates.get(name):
            yield {"error": "died", "traceback": "Traceback: here"}
            return
        yield row(85)

    monkeypatch.setattr(command, "rows_of", run)
    monkeypatch.setattr(command, "gpu", lambda: "one GPU")
    output = tmp_path / "rows.json"

    def measured(*flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["", *flags, "--output", str(output)])
        with pytest.raises(SystemExit) as stop:
            main(command.rivals)
        return stop.value.code

    fates["2x16384"] = True
    assert measured() == 1  # what was known before it died is there
    rows = json.loads(output.read_text())["rows"]
    assert rows["8x1024"]["is_whole"] and rows["2x16384"]["rounds"] == 0
    assert rows["2x16384"]["error"] == "died"
    assert rows["2x16384"]["traceback"] == "Traceback: here"
    fates.clear()
    assert measured("--minutes", "9") == 0
    record = json.loads(output.read_text())
    assert asked == [("8x1024", False), ("2x16384", False), ("2x16384", True)]
    assert record["command"].endswith(f"rivals --minutes 9 --output {output}")
    assert record["rows"]["2x16384"]["is_whole"] and "error" not in record["rows"]["2x16384"]
    monkeypatch.setattr(command, "gpu", lambda: "another GPU")
    fates["8x1024"] = True
    assert measured("--shape", "8x1024") == 1 and asked[-1] == ("8x1024", False)
    assert "every bound holds" in capsys.readouterr().out


def test_a_timed_shape_is_not_lost_to_one_that_is_not(monkeypatch, tmp_path):
    output, rounds = tmp_path / "rows.json", iter([5, 2])

    def run(module, case, seconds):
        yield row(85, rounds=0, is_whole=False)
        yield row(85, rounds=next(rounds), is_whole=False)

    monkeypatch.setattr(command, "rows_of", run)
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(command.rivals, ["--shape", "8x1024", "--output", str(output)])
        assert json.loads(output.read_text())["rows"]["8x1024"]["rounds"] == 5


@pytest.mark.heavy
def test_a_tiny_shape_from_end_to_end(monkeypatch, tmp_path):
    from benchmarks.rivals_parts import process

    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))
    asked = {"none": (), "names:q,k,v": ("save_qkv_proj",), "names:qq": ("mistyped",)}
    monkeypatch.setattr(process, "fixed", lambda: asked)
    shape = process.Shape(TINY_SHAPE, None)
    found = [one for one in shape.run() if "rounds" in one]
    assert [one["rounds"] for one in found] == [0, 1, 2, 3, 3]
    assert not found[0]["is_whole"] and "seconds" not in found[0]["plans"]["none"]
    last = json.loads(json.dumps(found[-1]))
    assert last["is_whole"] and last["left_out"] == []
    assert last["compiles"] == len(shape.programs.made) <= 8
    assert "names:qq matches no tag" in last["plans"]["names:qq"]["error"]
    top, low = bounds.compared(last)
    assert top["plan"] == "none" and top["best fixed"] in ("none", "names:q,k,v")
    assert low["ms"] > 0 and low["best fixed"] is None  # nothing fixed is as lean as the leanest
    for one in last["budgets"]:
        assert one["compiled_bytes"] <= one["budget_bytes"]
        assert len(last["plans"][one["plan"]]["seconds_of_rounds"]) == 3


def test_what_there_is_no_time_for_is_named():
    from benchmarks.rivals_parts import process

    shape = process.Shape(TINY_SHAPE, 1e-9)
    assert list(shape._compile_fixed()) == [] and shape.programs.made == []
    assert shape.left_out[0] == "the fixed plan none" and len(shape.left_out) == 14


def test_a_program_that_fails_takes_no_more_turns():
    from benchmarks.rivals_parts.programs import Program, Turns, failed

    ran, made = [], []

    def program(name, fails_at=None):
        def step(state, tokens):
            ran.append(name)
            if ran.count(name) == fails_at:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")
            return state + 1, {}

        return Program(plan=name, compiled=step, seconds=1.0)

    good, bad = program("good"), program("bad", fails_at=4)
    turns = Turns([good, bad], lambda: made.append(0) or 0, None)
    assert list(turns.rounds(3, steps=2)) == [1, 2, 3]
    assert [*turns.errors] == [bad] and len(made) == 2
    kept = failed(turns.errors[bad])
    assert kept["error"] == "RESOURCE_EXHAUSTED: out of memory" and "in step" in kept["traceback"]
    assert len(turns.seconds[good]) == 3 and turns.seconds[bad] == []
    # The round that is not timed, then a step more than is timed in each turn.
    assert ran == [*["good"] * 2, *["bad"] * 2, *["good"] * 3, *["bad"] * 2, *["good"] * 6]
    assert list(Turns([good], lambda: 0, None).rounds(9, steps=1, until=0.0)) == [1, 2, 3]


def test_what_jax_adds_below_an_error_is_not_the_error():
    from benchmarks.record import _says_something

    log = "Traceback\nValueError: 3\n------\nFor simplicity, JAX has removed its internal frames"
    assert [*filter(_says_something, log.splitlines())][-1] == "ValueError: 3"


def test_a_process_that_fails_says_its_last_line():
    from benchmarks.record import rows_of

    (row,) = rows_of("no_such")
    assert row["error"].endswith("No module named benchmarks.no_such")
    assert "No module named" in row["traceback"]
