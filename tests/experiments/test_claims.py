"""`experiments.claims`: verdicts follow from numbers, rows are kept, the page is the numbers'."""

import json
import re

import pytest

from experiments.claiming import checks, numbers
from experiments.claiming.cases import PLANS, ROOT, all_cases
from experiments.claiming.evidence import Evidence, gather
from experiments.claiming.page import TEMPLATE, names_of, page
from experiments.claims import claims
from experiments.cli import main
from experiments.fitting.row import FitRow
from jaxckpt.plans import PlanError
from tests.experiments.test_fit import GIB, report

# Peaks in GiB that follow from theory: 32 inputs of 1/16, residuals of 16 inputs a block.
PEAKS = {"none": 44.0, "full": 15.0, "uniform:4": 21.0, "uniform:5": 19.5, "uniform:6": 18.6}
PEAKS |= {"sqrt": 13.7, "log": 13.5}


def fake_report(case):
    """Returns the report of a case as theory has it."""
    peak = PEAKS.get(case.config.remat, 14.0)
    peak = {"in one part": 18.0, "in four parts": 11.0, "float32": 20.0}.get(case.name, peak)
    again = 0 if case.config.remat == "none" else 28
    return report(peak, seconds=0.1 + 0.001 * again, again=again, temp_bytes=int((peak - 10) * GIB))


class Failure:
    """What a case that fails raises."""

    kind = RuntimeError


@pytest.fixture
def compiling(monkeypatch):
    """Answers in place of the compiler; the names of what was compiled, and of what fails."""
    asked, failing = [], set()
    by_config = {(case.config, case.target): case for case in all_cases()}

    def measure_all(cases, parallel):
        ((config, target),) = cases
        case = by_config[config, target]
        asked.append(case.name)
        if case.name in failing:
            return [FitRow(config=config, target=target, failure=Failure.kind("no such thing"))]
        return [FitRow(config=config, target=target, report=fake_report(case))]

    monkeypatch.setattr(numbers, "measure_all", measure_all)
    monkeypatch.setattr(numbers, "check_targets", lambda targets: None)
    found = {"dropout_difference": 0.0, "dropout_off_difference": 1.5, "parameters": 596_049_920}
    monkeypatch.setattr(checks, "run", lambda: asked.append("checks") or found)
    return asked, failing


def run(tmp_path) -> str:
    out = tmp_path / "claims.md"
    main(claims, [f"-o={out}", f"--numbers={tmp_path / 'claims.json'}"])
    return out.read_text()


def test_the_page_has_every_claim_and_plan(compiling, tmp_path):
    text = run(tmp_path)
    assert text.count("\n## ") == 16
    verdicts = [line for line in text.splitlines() if line.startswith(("**true", "**false"))]
    assert len(verdicts) == 16
    for plan in PLANS:
        assert text.count(f"| `{plan}` |") == 4
    assert "67.1 MB" in text and "596 million parameters" in text


def test_what_is_there_is_not_compiled_again(compiling, tmp_path, monkeypatch):
    asked, failing = compiling
    failing.add("4B")
    with pytest.raises(RuntimeError, match="no such thing"):  # a fault is none of the user's
        run(tmp_path)
    (tmp_path / "claims.json").unlink()
    asked.clear()
    monkeypatch.setattr(Failure, "kind", PlanError)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path)
    assert stop.value.code == 2 and not (tmp_path / "claims.md").exists()
    assert len(asked) == len(all_cases())
    failing.clear()
    asked.clear()
    first = run(tmp_path)
    assert asked == ["4B", "checks"]
    assert run(tmp_path) == first and asked == ["4B", "checks"]
    rows = json.loads((tmp_path / "claims.json").read_text())["rows"]
    assert [*rows] == [case.name for case in all_cases()], "in their own order"


def test_without_the_compilers_claims_are_open(compiling, tmp_path):
    asked, _ = compiling
    main(claims, [f"-o={tmp_path / 'c.md'}", f"--numbers={tmp_path / 'n.json'}", "--no-compile"])
    text = (tmp_path / "c.md").read_text()
    assert "the example, v5e-1, none is not compiled yet.\n\n**open.**" in text and not asked
    assert text.count("| not compiled yet |") == 4 * len(PLANS)


def evidence_with(**changes) -> Evidence:
    """Returns the evidence of theory, with other GiB of peak and temporaries for some plans."""
    rows = {}
    for case in all_cases():
        values = fake_report(case).as_json()
        extra = changes.get(case.config.remat.replace(":", "_"), 0) * GIB
        values |= {name: int(values[name] + extra) for name in ("peak_bytes", "temp_bytes")}
        about = {"plan": case.config.remat, "versions": {"jax": "1"}, "commit": "0"}
        rows[case.name] = about | {"report": values}
    found = {"dropout_difference": 0.0, "dropout_off_difference": 1.5, "parameters": 596_049_920}
    return gather(rows, found)


@pytest.mark.parametrize(
    "number, usual, changes, other",
    [
        (3, "false: with more segments it falls", {"uniform_6": 9}, "true in part: (L / n) R"),
        (4, "true in part: not by uniform segments", {"uniform_6": -9}, "true.**"),
        (5, "false for uniform segments", {"uniform_5": -9}, "true in part.**"),
        (7, "true in part: right for one tensor a layer", {"none": -28}, "true.**"),
        (8, "true in part: right for stored inputs", {"none": 300}, "true.**"),
        (12, "false.**", {"auto": -5}, "true: the planner"),
    ],
)
def test_verdicts_follow_from_the_numbers(number, usual, changes, other):
    assert verdict(number, evidence_with()).startswith(usual)
    assert verdict(number, evidence_with(**changes)).startswith(other)


def verdict(number: int, evidence: Evidence) -> str:
    """Returns the verdict of a claim of the page."""
    section = page(evidence).split(f"\n## {number}. ")[1].split("\n## ")[0]
    return section.strip().split("\n\n**")[1]


def test_every_condition_of_a_verdict_can_be_decided():
    conditions = re.findall(r"\*\* if (.+)", TEMPLATE.read_text())
    names = names_of(evidence_with())
    assert len(conditions) >= 15 and all(type(eval(one, names)) is bool for one in conditions)


def test_residuals_are_found_from_two_plans():
    evidence = evidence_with()
    a = evidence.input_bytes("the example")
    assert a == 8 * 1024 * 4096 * 2
    assert evidence.residual_bytes() == pytest.approx(a + 29 * GIB / 31)


def test_the_page_in_the_docs_is_that_of_its_numbers(tmp_path, monkeypatch):
    kept = ROOT / "docs/measured/claims.json"
    monkeypatch.setattr(numbers, "measure_all", None)  # nothing is compiled
    out = tmp_path / "claims.md"
    main(claims, [f"-o={out}", f"--numbers={kept}", "--no-compile"])
    assert out.read_text() == (ROOT / "docs/claims.md").read_text()


@pytest.mark.heavy
def test_segments_give_the_gradients_of_none():
    assert checks._dropout_difference() < 1e-6


@pytest.mark.parametrize(
    "flags, message",
    [
        (["-o=claims.html"], "ends in '.html'; valid: .md"),
        (["--numbers={}/broken.json"], "does not hold the numbers of claims; remove it"),
        (["-o=nowhere/claims.md"], "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, capsys):
    (tmp_path / "broken.json").write_text('{"rows": 3')
    with pytest.raises(SystemExit) as stop:
        main(claims, [flag.format(tmp_path) for flag in flags])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and message in err and not out
    assert err.startswith("error: ") and err.count("\n") == 1
