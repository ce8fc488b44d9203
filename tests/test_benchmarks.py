"""`python -m benchmarks.executor`: its parts in small form, its exit code, what it writes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import cases, executor, peaks, record, step, step_jax
from benchmarks.executor_parts import compile as compile_time
from benchmarks.executor_parts import copies, equality, evaluations, nested, temp
from experiments.cli import main

MODULES = {
    "equality": equality,
    "evaluations": evaluations,
    "temp": temp,
    "nested": nested,
    "compile": compile_time,
    "copies": copies,
}


def test_the_documented_table_names_the_command_that_made_it():
    page = record.PATH.read_text()
    table = page.split(record.BEGIN)[1].split(record.END)[0]
    assert table.startswith("\nMade by `python -m benchmarks.executor")
    assert "--write-docs" in table.splitlines()[1]
    for plan in temp.PLANS:
        assert f"| {plan} |" in table
    assert "| NO |" not in table


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=[pytest.mark.heavy] if part in ("compile", "nested") else [])
        for part in executor.PARTS
    ],
)
def test_part_in_quick_form(part):
    result = MODULES[part].run(quick=True)
    assert result.rows
    assert result.failures == []
    json.dumps(result.as_json())


def test_a_doctored_result_fails_the_command(monkeypatch, tmp_path, capsys):
    """`log` is given memory that grows like `full`'s: one line says so, and the exit code is 1."""
    output = tmp_path / "found" / "executor.json"
    flags = ["--part", "temp", "--quick", "--output", str(output)]
    monkeypatch.setattr(temp, "local", lambda fn, params, carry: carry.size * 4 * params.shape[0])
    monkeypatch.setattr(sys, "argv", ["", *flags])
    with pytest.raises(SystemExit) as exit:
        main(executor.executor)
    assert exit.value.code == 1
    assert "temp: cpu" in (printed := capsys.readouterr().out)
    assert "log: carries a doubling 24.000, at most 1.1" in printed
    record = json.loads(output.read_text())
    assert record["command"] == " ".join(["python -m benchmarks.executor", *flags])
    assert len(record["failures"]) == 3  # sqrt, log and binomial:8; full grows as it should
    assert {"commit", "versions", "device", "backend"} <= set(record)


def test_the_checks_see_what_they_are_for():
    row = {"block": "MLP with dropout", "L": 7, "plan": "log"}
    row |= {"loss": 0.0, "params": 1e-7, "carry": 0.0, "consts": 1e-7}
    assert len(equality.check([row], exact=True)) == 1
    assert equality.check([row], exact=False) == []
    row = {"L": 4, "plan": "log", "evaluated": 9, "expected": 8, "each_block": False}
    assert "9 blocks ran, 8 expected" in evaluations.check([row])[0]
    assert compile_time.check([{"plan": "log", "ratio": float("nan")}])
    module = "%copy.1 = f32[32,512,512]{2,1,0} copy(f32[32,512,512]{2,1,0} %x)"
    assert copies.count_copies(module) == 1
    assert copies.count_copies(module.replace("copy(", "add(")) == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--part", "tmp"], "temp"),
        (["--width", "100"], "--width is 100; valid: a multiple of 128"),
        (["--write-docs", "--quick"], "--write-docs writes the whole table"),
    ],
)
def test_a_refused_command_line_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(executor.executor, flags)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_what_stands_around_the_documented_table_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{record.BEGIN}\nold\n{record.END}\nbelow\n")
    result = temp.Result(title="", rows=[{"plan": "log", "L=16": None}])
    made_by = {"command": "python -m x", "versions": {"jax": "1"}, "device": "cpu"}
    record.write_section(result, made_by, page)
    assert page.read_text() == (
        f"above\n{record.BEGIN}\nMade by `python -m x` on cpu, jax 1.\n\n"
        f"| plan | L=16 |\n| --- | --- |\n| log | - |\n{record.END}\nbelow\n"
    )


def test_the_step_benchmark_tells_what_fails():
    row = lambda seconds, peak: {"seconds": seconds, "peak_bytes": peak}
    rows = {"short: full": row(0.7, 9), "short: torch.compile + checkpoint": row(1.0, 10)}
    assert step.check(rows) == []
    rows["short: full"] = row(0.71, 11)
    slow, large = step.check(rows)
    assert "0.710 of the time" in slow and "bound 0.7" in slow
    assert "1.100 of the memory" in large and "bound 1.0" in large
    assert step.check({"short: none": {"error": "no GPU"}}) == ["short: none: no GPU"]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("nvjet_sm90_tst_128x128_64x6_2x1_v_bz_TNT", "matrix products"),
        ("gemm_fusion_dot_38", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_", "attention forward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_", "attention backward"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(", "attention backward"),
        ("memcpy128", "copies"),
        ("loop_add_multiply_fusion", step_jax.OTHER),
    ],
)
def test_kernels_are_told_by_name(name, kind):
    assert step_jax.kind_of(name) == kind


def test_what_starts_processes_imports_no_jax():
    """They choose the platform, and leave the chip to the processes."""
    code = (
        "import sys\n"
        "from benchmarks import peaks, planner, rivals, step, xla_options\n"
        "print('jax' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    "module", ["planner_parts.process", "rivals_parts.process", "loops_parts.process", "step_jax"]
)
def test_the_process_of_a_part_is_there(module):
    assert importlib.util.find_spec(f"benchmarks.{module}") is not None
    sources = [path.read_text() for path in Path(executor.__file__).parent.glob("*.py")]
    assert any(f'"{module}"' in text for text in sources)


@pytest.mark.slow
def test_a_tiny_step_is_timed(capfd):
    """What `step`, `xla_options` and `peaks` are handed by its process."""
    case = cases.tiny(cases.SHORT) | {"plan": "full"}
    (row,) = record.rows_of("step_jax", case)
    assert row["seconds"] > 0 and row["recomputed_flops"] > 0
    assert {"compiled_peak_bytes", "runtime_bytes", "estimated_seconds", "device"} <= set(row)


def test_peaks_are_those_that_the_steps_process_tells(monkeypatch, tmp_path, capsys):
    """A row of each point in the words of `peaks_h100.json`; what failed is named."""
    said = {"compiled_peak_bytes": 101, "runtime_bytes": 100, "estimated_seconds": 0.5}
    said |= {"seconds": 0.6, "attention": "plain", "loss": 5.5, "device": "gpu (X)", "unroll": 1}

    def rows_of(module, case):
        assert module == "step_jax" and case["batch_size"] == 2
        yield {"error": "died", "traceback": ""} if case["plan"] == "sqrt" else said

    absent = lambda jobs, parallel: [SimpleNamespace(peak_bytes=100) for _ in jobs]
    monkeypatch.setattr(peaks, "rows_of", rows_of)
    monkeypatch.setattr(peaks, "measure_many", absent)
    monkeypatch.setattr(peaks, "POINTS", (("full", 8, 1024), ("sqrt", 8, 1024)))
    output = tmp_path / "peaks.json"
    with pytest.raises(SystemExit) as stop:
        main(peaks.peaks, ["--tiny", "--target=v5e-1", f"--output={output}"], package="benchmarks")
    assert stop.value.code == 1 and "sqrt: died" in capsys.readouterr().out
    made = json.loads(output.read_text())
    full, sqrt = made["rows"]
    kept = json.loads((record.ROOT / "docs/measured/peaks_h100.json").read_text())["rows"][0]
    assert set(kept) <= set(full) and sqrt["error"] == "died"
    assert (full["present_bytes"], full["estimated"]) == (101, 0.5)
    assert made["device"] == "gpu (X)" and made["backend"] == "gpu"
