"""What does nothing is said by train and fit: one warning line with its cure."""

import dataclasses
import json

import pytest

from experiments.config import TrainConfig
from experiments.training.build import build
from experiments.training.plan_checks import against_none
from jaxckpt.memory.measure import compile_step
from jaxckpt.models.config import TransformerConfig
from tests.experiments import runs

# Logits weigh more than all that two small blocks keep.
HEAVY_HEAD = ("--vocab-size=8192", "--num-blocks=2", "--batch-size=2", "--steps=1")
CURE = "a loss in chunks of tokens does"


def built(**settings):
    model = TransformerConfig(num_blocks=2, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8)
    return build(TrainConfig(model=model, **settings), "local")


@pytest.mark.heavy
def test_train_warns_of_a_head_that_sets_the_peak_and_records_it(tmp_path):
    printed = runs.train(*HEAVY_HEAD, f"--out={tmp_path / 'run'}", cache=tmp_path / "cache")
    lines = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert any("the loss head sets the peak" in line and CURE in line for line in lines), printed
    header = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert [f"warning: {finding}" for finding in header["findings"]] == lines


@pytest.mark.slow
def test_a_plan_that_saves_leaves_no_line_and_compiles_nothing_more(monkeypatch):
    step = built(remat="log", batch_size=16, seq_len=256)
    _, report = compile_step(step)
    compiled = []
    monkeypatch.setattr("experiments.training.plan_checks.compile_step", compiled.append)
    findings, gain = against_none(step, report)
    assert findings == [] and not compiled
    known = compile_step(built(remat="none", batch_size=16, seq_len=256))[1].peak_bytes
    assert gain.startswith("none needs ") and " MiB (estimated): log keeps " in gain
    share = report.recomputed_flops / (report.flops - report.recomputed_flops)
    assert gain.endswith(f"of it and recomputes {100 * share:.1f} % of the FLOPs")
    estimated = float(gain.split()[2]) * 2**20
    assert abs(estimated - known) < 0.1 * known
    assert f"keeps {100 * report.peak_bytes / estimated:.0f} % of it" in gain


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["none", pytest.param("full", marks=pytest.mark.heavy)])
def test_none_itself_is_not_compared(plan, monkeypatch):
    step = built(remat=plan, batch_size=1, seq_len=8)
    _, report = compile_step(step)
    # What is compared is the compiled peaks: were that of `none` larger, there is no finding.
    larger = dataclasses.replace(report, peak_bytes=2 * report.peak_bytes)
    monkeypatch.setattr("experiments.training.plan_checks.compile_step", lambda _: (None, larger))
    findings, gain = against_none(step, report)
    assert findings == [] and gain.startswith("none needs ") == (plan == "full")
    assert "estimated" not in gain and (": full keeps 50 % of it" in gain) == (plan == "full")
    monkeypatch.setattr("experiments.training.plan_checks.compile_step", lambda _: (None, report))
    findings, gain = against_none(step, report)
    assert bool(findings) == (plan == "full") and gain == ""
