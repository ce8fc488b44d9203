"""`python -m benchmarks.functions`: its models, a small run, its bounds, its exit codes."""

import functools
import json

import jax
import pytest

from benchmarks import functions
from benchmarks.functions_parts.bounds import check, table
from benchmarks.functions_parts.models import MODELS
from benchmarks.functions_parts.process import _by_hand, step_for
from experiments.cli import main
from jaxckpt.costs.roofline import UNKNOWN
from jaxckpt.planner.steps import Steps
from jaxckpt.targets.target import parse_target
from tests.experiments.test_fit import report


def test_every_model_traces_as_its_owner_would_place_checkpoints():
    assert set(functions.MODELS) == set(MODELS)
    for name in ("fourier", "resnet"):  # the small run compiles another; all are alike here
        case = {"model": name, "tiny": True}
        shapes = [jax.eval_shape(*_called(step_for(case, plan))) for plan in ("stages", "full")]
        assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])


def test_dots_is_no_plan_by_hand_for_complex_products():
    case = {"model": "fourier", "tiny": True, "target": "v5e-1"}

    def report_of(plan):
        jax.eval_shape(*_called(step_for(case, plan)))
        return report(1.0)

    steps = Steps(functools.partial(step_for, case), parse_target("v5e-1"), report_of)
    assert list(dict(_by_hand(case, steps, UNKNOWN))) == ["none", "stages", "full"]


def _called(step):
    fn, args = step
    return fn, *args


@pytest.mark.slow
def test_a_small_run_leaves_its_rows_and_goes_on(tmp_path, capsys):
    output = tmp_path / "functions.json"
    flags = ["--tiny", "--model=mixer", "--budgets=2", f"--output={output}"]
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(functions.functions, flags)
        record = json.loads(output.read_text())
        assert [row["place"] for row in record["rows"]] == [-1, 0, 1]
    top, least = record["rows"][1:]
    assert top["plan"] == "none" and least["peak_bytes"] <= least["budget_bytes"]
    assert top["gradient_error"] == 0 and least["gradient_error"] <= 1e-6
    assert "mixer" in capsys.readouterr().out


def rows(**changes):
    hand = {"none": {"bytes": 100, "roofline": 1.0}, "full": {"bytes": 50, "roofline": 1.5}}
    about = {"name": "unet v5e-1", "tiny": True}
    first = about | {"place": -1, "hand": hand, "planned": 1.0, "least": 50}
    row = about | {"budget_bytes": 80, "peak_bytes": 70, "roofline": 1.2, "gradient_error": 0.0}
    row |= {"place": 0, "plan": "full", "compiles": 3}
    return [first, row | changes, row | {"place": 1, "budget_bytes": 60, "peak_bytes": 60}]


def test_each_bound_can_fail():
    assert check(rows()) == []
    assert any("full 1500.00" in line for line in table(rows()))
    for changes, said in (
        ({"peak_bytes": 81}, "above the budget"),
        ({"roofline": 1.6}, "1.07 of the time of full, which fits"),
        ({"gradient_error": 1e-5}, "gradients differ by 1.0e-05"),
        ({"peak_bytes": 55}, "the peak grows"),
    ):
        assert any(said in line for line in check(rows(**changes))), changes


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model=unett"], "unett"),
        (["--budgets=1"], "budgets is 1; the least is 2"),
        (["--limit=0"], "limit is 0; the least is 1"),
    ],
)
def test_what_is_not_valid_is_said_in_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as exit:
        main(functions.functions, flags)
    assert exit.value.code == 2
    assert said in capsys.readouterr().err
