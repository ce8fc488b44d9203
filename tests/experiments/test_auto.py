"""`auto` as a plan: of a run, of `experiments.fit`, of the largest size that fits."""

import dataclasses
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import jaxckpt
from experiments.cli import main
from experiments.config import ConfigError, OptimizerConfig, TrainConfig
from experiments.data import Corpus
from experiments.fit import fit
from experiments.fitting import measuring, table
from experiments.train import train
from experiments.training import choose_plan, loop
from experiments.training.build import build, entry_of
from experiments.training.loop import run
from jaxckpt.absent import launch
from jaxckpt.compiled.peak import compile_lowered
from jaxckpt.memory.measure import compile_step
from jaxckpt.models import TransformerConfig
from jaxckpt.planner.result import BudgetError, FitResult
from jaxckpt.targets.target import parse_target
from tests.experiments.test_fit import report

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("auto")]

MODEL = TransformerConfig(
    num_blocks=3, d_model=32, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=64, dropout=0.1
)
CONFIG = TrainConfig(
    model=MODEL,
    optimizer=OptimizerConfig(kind="sgd"),
    steps=3,
    batch_size=8,
    accumulate=2,
    seq_len=64,
    validation_batches=1,
)
FLAGS = (
    *("--num-blocks=3", "--d-model=32", "--num-heads=2", "--num-kv-heads=1", "--head-dim=8"),
    *("--d-ff=64", "--dropout=0.1", "--steps=3", "--batch-size=8", "--accumulate=2"),
    *("--seq-len=64", "--optimizer=sgd"),
)


@pytest.fixture(autouse=True, scope="module")
def folders(tmp_path_factory):
    """Own folders for what is kept on disk; programs are compiled fast, to the same peaks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCKPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        before = jax.config.values["jax_disable_most_optimizations"]
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


def corpus() -> Corpus:
    tokens = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
    return Corpus(train=tokens[:3000], validation=tokens[3000:], sha256="0" * 64, name="random")


def trained(folder, **changes) -> tuple[dict, list[tuple[float, float]]]:
    """Returns the header of a run's record, and each step's loss and norm of the gradients."""
    cache = Path(jax.config.jax_compilation_cache_dir)
    config = dataclasses.replace(CONFIG, out=folder, compile_cache=cache, **changes)
    folder.mkdir(exist_ok=True)
    run(config, corpus(), folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    headers = [row for row in rows if "versions" in row]
    return headers[-1], [(row["loss"], row["gradient_norm"]) for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """Compiled peaks of a step under some plans."""

    def peak_of(plan: str) -> int:
        step = build(dataclasses.replace(CONFIG, remat=plan), "local")
        return jaxckpt.measure(step.fn, *step.args, donate_argnums=0).peak_bytes

    return {plan: peak_of(plan) for plan in ("none", "full")}


@pytest.fixture(scope="module")
def budget(peaks) -> int:
    """A budget that `none` does not fit."""
    assert peaks["full"] < peaks["none"]
    return (peaks["none"] + peaks["full"]) // 2


@pytest.fixture(scope="module")
def chosen(budget, tmp_path_factory):
    """A run under `auto`: its folder, header and losses."""
    folder = tmp_path_factory.mktemp("chosen") / "run"
    return folder, *trained(folder, remat="auto", budget=str(budget), save_every=3)


def test_a_run_trains_under_the_plan_that_was_chosen(chosen, budget, peaks, tmp_path):
    folder, header, losses = chosen
    plan = jaxckpt.Plan.parse(header["plan"])
    assert "auto" not in header["plan"] and header["budget_bytes"] == budget
    config = dataclasses.replace(CONFIG, remat=str(plan))
    step = compile_step(build(config, "local"))[1]
    assert header["predicted_peak_bytes"] == step.peak_bytes <= budget < peaks["none"]
    # The configuration as run repeats it without the planner.
    written = tomllib.loads((folder / "config.toml").read_text())
    assert jaxckpt.Plan.parse(written["remat"]).bind(3) == plan and "budget" not in written
    _, expected = trained(tmp_path / "none", remat="none")
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


@pytest.fixture(scope="module")
def result(chosen, budget) -> FitResult:
    """What the planner chose for the run, asked again: from disk."""
    config = dataclasses.replace(CONFIG, remat="auto", budget=str(budget))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_plan, "_solved", None)
        return choose_plan.choose(config, "local")


@pytest.fixture(scope="module")
def infeasible(result) -> BudgetError:
    """What the planner says when nothing fits."""
    parts = {"arguments[0].params": 1, "one block's residuals": result.report.peak_bytes - 1}
    return BudgetError(budget_bytes=30000, plan=result.plan, report=result.report, parts=parts)


def test_the_second_start_compiles_nothing_to_plan(chosen, result):
    assert str(result.plan.bind(3)) == chosen[1]["plan"]


def test_what_is_verified_is_compiled_with_the_options_of_what_runs(monkeypatch):
    monkeypatch.setattr(
        "experiments.training.build.compiler_options", lambda _: {"xla_not_there": 1}
    )
    config = dataclasses.replace(CONFIG, remat="auto", budget="1MiB")
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_not_there"):
        choose_plan.choose(config, "local")


@pytest.mark.heavy
def test_what_was_compiled_to_plan_is_what_runs(budget, tmp_path, monkeypatch):
    """JAX's own cache has the program of the chosen plan when the run asks for it."""
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    monkeypatch.setattr(loop, "keep_compiled", lambda *_: None)
    read, asked = [], []

    def compiled(lowered, **options):
        before = len(read)
        made = compile_lowered(lowered, **options)
        asked.append((lowered.as_text(), len(read) > before))
        return made

    def listen(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            read.append(event)

    monkeypatch.setattr("jaxckpt.compiled.peak.compile_lowered", compiled)
    jax.monitoring.register_event_listener(listen)
    try:
        trained(tmp_path / "run", remat="auto", budget=str(budget))
    finally:
        jax.monitoring.unregister_event_listener(listen)
    (text, is_read), *others = [one for one in asked if one[1]]
    assert is_read and not others, "the planner compiles every program once"
    assert [one == text for one, _ in asked].count(True) == 2, "once to plan, once to run"


def test_flops_are_those_of_the_whole_accumulated_step(result):
    assert result.chosen.flops == result.report.flops


def test_a_resumed_run_keeps_its_plan_and_is_planned_anew_if_asked(
    chosen, budget, result, monkeypatch
):
    folder, header, losses = chosen
    asked = []

    def choose(*_, budget, progress):
        asked.append(budget)
        return dataclasses.replace(result, plan=jaxckpt.Plan.parse("full"))

    monkeypatch.setattr(choose_plan, "choose", choose)
    again = {"resume": True, "remat": "auto", "save_every": 3}
    same, more = trained(folder, **again, budget=str(budget))
    assert same["plan"] == header["plan"] and not asked and more == losses
    assert same["resumed_from_step"] == 3
    other, _ = trained(folder, **again, budget=str(budget - 1))
    assert asked == [budget - 1] and other["plan"] == "3xfull"


def test_a_plan_that_needs_more_than_the_budget_is_refused(peaks, tmp_path):
    with pytest.raises(ConfigError, match=r"plan 'none' needs .* more than the budget.*auto"):
        trained(tmp_path / "run", remat="none", budget=str(peaks["full"]))
    assert not list((tmp_path / "run").iterdir())


def test_a_plan_that_moves_more_than_the_hosts_budget_is_refused():
    config = dataclasses.replace(CONFIG, remat="offload:carry", host_budget="1MiB")
    needs = report(1.0, host_bytes=2**21)
    limit = choose_plan.host_limit_bytes(config)
    choose_plan.check_within(config, report(1.0, host_bytes=2**20), None, limit)
    with pytest.raises(ConfigError, match=r"'offload:carry' .* the host budget of 1\.00 MiB"):
        choose_plan.check_within(config, needs, None, limit)
    row = measuring.FitRow(config=config, target="v5e-1", report=needs, host_budget_bytes=limit)
    assert row.fits is False and row.as_json()["host_budget_bytes"] == 2**20


def refused(command, flags, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(command, flags)
    *progress, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and error.startswith("error: "), error
    assert all(line.startswith("auto on ") for line in progress), progress
    return error


def out_of(command, folder) -> list[str]:
    """Returns the flags of a run, for the command that makes one."""
    flags = [f"--out={folder / 'run'}", "--data=README.md", "--validation-batches=1"]
    return flags if command is train else []


@pytest.mark.parametrize("command", [train, fit])
def test_nothing_fits(command, infeasible, monkeypatch, capsys, tmp_path):
    def choose(*_, **__):
        raise infeasible

    monkeypatch.setattr(choose_plan, "choose", choose)
    monkeypatch.setattr(measuring, "choose", choose)
    flags = [*FLAGS, "--remat=auto", "--budget=30KB", *out_of(command, tmp_path)]
    err = refused(command, flags, capsys)
    assert "no plan fits 29.30 KiB (30000 bytes)" in err
    assert f"({infeasible.least_bytes} bytes), with --remat={infeasible.plan}" in err
    assert "arguments[0].params" in err and "one block's residuals" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [train, fit])
def test_a_device_that_does_not_say_what_it_can_use(command, capsys, tmp_path):
    flags = [*FLAGS, "--remat=auto", "--budget=auto", *out_of(command, tmp_path)]
    err = refused(command, flags, capsys)
    assert "which local does not tell" in err and "--budget=15GiB" in err


def test_auto_in_a_configuration_file(tmp_path, capsys):
    path = tmp_path / "x.toml"
    path.write_text("remat = 'auto'\nbudget = '15GBB'\n")
    assert "unit 'GBB' (did you mean 'GB'?)" in refused(train, [f"--config={path}"], capsys)
    path.write_text("remat = 'auto'\nbudget = 15\n")
    assert "budget = 15 is int" in refused(train, [f"--config={path}"], capsys)
    path.write_text("remat = 'auto'\nbudget = 'auto'\n")
    flags = [f"--config={path}", f"--out={tmp_path / 'run'}", "--data=README.md"]
    assert "which local does not tell" in refused(train, flags, capsys)


@pytest.mark.parametrize("asked", [["--plan=auto", "--plan=none"], ["--remat=auto"]])
def test_fit_has_a_row_for_what_was_chosen(asked, result, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measuring, "choose", lambda *_, **__: result)
    monkeypatch.setattr(measuring, "_measure", lambda *_: report(0.1))
    path, budget = tmp_path / "rows.json", result.budget_bytes
    main(fit, [*FLAGS, *asked, f"--budget={budget}", f"--json={path}"])
    out = capsys.readouterr().out
    chosen, *rest = json.loads(path.read_text())["rows"]
    assert chosen["plan"] == chosen["auto"]["plan"] == str(result.plan)
    assert chosen["peak_bytes"] <= budget == chosen["budget_bytes"] and chosen["fits"] is True
    assert chosen["recomputed_flops"] > 0, "a row like any other"
    assert [row["fits"] for row in rest] == [False] * (len(asked) - 1)
    row = next(line for line in out.splitlines() if line.startswith(f"{result.plan} "))
    assert row.removeprefix(str(result.plan)).split()[:2] == ["fastest", "(auto)"]
    assert f"--remat={result.plan}\n" in out and result.why in out


def test_rows_are_held_against_the_budget(monkeypatch, capsys, tmp_path):
    reports = {"none": report(20.0), "full": report(10.0, seconds=2.0)}
    monkeypatch.setattr(measuring, "_measure", lambda config, *_: reports[config.remat])
    monkeypatch.setattr(measuring, "check_targets", lambda *_: None)
    path = tmp_path / "rows.json"
    flags = ["--target=v5e-1", "--plan=none", "--plan=full", f"--json={path}"]
    for size, fits in {
        "9GiB": [False, False],
        "12GiB": [False, True],
        "21GiB": [True, True],
    }.items():
        main(fit, [*flags, f"--budget={size}"])
        out = capsys.readouterr().out
        assert [row["fits"] for row in json.loads(path.read_text())["rows"]] == fits
        warned = "warning: the budget of 21.00 GiB is more than the 15.75 GiB" in out
        assert warned == (size == "21GiB") and f"a budget of {size[:-3]}.00 GiB" in out


# Peaks of plans by batch size, in a world where the least peak is that of another plan from 8 on.
WORLD = {"none": lambda n: 4 * n, "full": lambda n: 2 * n, "log": lambda n: 4 + n}


def plans_of_the_world(config, target, budget=None, progress=None):
    """Returns what a planner would: the first of WORLD that fits, as fast as it is early."""
    limit = (budget or choose_plan.limit_bytes(config, target)) >> 30
    peaks = {plan: peak(config.batch_size) for plan, peak in WORLD.items()}
    for plan, peak in peaks.items():
        if peak <= limit:
            return FitResult(
                **{"plan": jaxckpt.Plan.parse(plan), "report": report(peak), "num_compiles": 1},
                **{"budget_bytes": limit << 30, "rows": (), "candidates": ()},
                chosen=None,
            )
    plan = min(peaks, key=peaks.get)
    raise BudgetError(
        budget_bytes=limit << 30,
        plan=jaxckpt.Plan.parse(plan),
        report=report(peaks[plan]),
        parts={},
    )


@pytest.mark.parametrize("start", [1, 5, 40])
@pytest.mark.parametrize(
    "budget, size, plan", [(3, 1, "full"), (6, 3, "full"), (16, 12, "log"), (1, 0, "full")]
)
def test_the_largest_batch_with_the_plan_that_does_it(start, budget, size, plan, monkeypatch):
    monkeypatch.setattr(measuring, "choose", plans_of_the_world)
    peak = lambda config: WORLD[config.remat](config.batch_size)
    monkeypatch.setattr(measuring, "_measure", lambda config, *_: report(peak(config)))
    config = TrainConfig(remat="auto", budget=f"{budget}GiB", batch_size=start)
    (row,) = measuring.measure_all([(config, "v5e-1")], largest="batch-size")
    assert row.error is None and (row.size, row.config.remat) == (size, plan)
    assert row.fits is (size > 0) and (row.auto is not None) == (size > 0)


# Peaks by tokens in a world where the MLP's hidden values are most, then the gradients.
def long_world(config) -> float:
    hidden = 8 * config.seq_len / config.model.mlp_tiles
    return (config.seq_len + hidden + (512 if config.update_in_backward else 2048)) / 1024


def plans_of_the_long_world(config, target, budget=None, progress=None):
    """Returns what a planner would whose only plan is full."""
    limit = choose_plan.limit_bytes(config, target) if budget is None else budget
    found = {"plan": jaxckpt.Plan.parse("full"), "report": report(long_world(config))}
    if found["report"].peak_bytes > limit:
        raise BudgetError(budget_bytes=limit, parts={}, **found)
    found |= {"budget_bytes": limit, "rows": (), "candidates": (), "chosen": None}
    return FitResult(**found, num_compiles=1)


@pytest.fixture
def long_steps(monkeypatch):
    """Steps of `long_world`, with tiles of 512 tokens."""
    monkeypatch.setattr(choose_plan, "_TILE_TOKENS", 512)
    monkeypatch.setattr(measuring, "choose", plans_of_the_long_world)
    monkeypatch.setattr(measuring, "_measure", lambda config, *_: report(long_world(config)))


@pytest.mark.parametrize(
    ("changes", "length", "flags"),
    [
        ({}, 3840, "--mlp-tiles=8 --update-in-backward"),
        ({"accumulate": 2, "batch_size": 2}, 2304, "--mlp-tiles=5"),  # refuses the update
        ({"budget": "3GiB"}, 256, "--update-in-backward"),  # a single tile
        ({"budget": "3200MiB", "accumulate": 2, "batch_size": 2}, 128, ""),
    ],
)
def test_the_longest_sequence_with_all_that_reaches_it(changes, length, flags, long_steps):
    config = TrainConfig(**{"remat": "auto", "budget": "8GiB", "seq_len": 1024} | changes)
    (row,) = measuring.measure_all([(config, "v5e-1")], largest="seq-len")
    assert row.error is None and row.fits and row.size == row.config.seq_len == length
    assert table._more_flags(row.config, config) == flags
    longer = dataclasses.replace(config, seq_len=length + 128)
    assert all(long_world(one) > row.budget_bytes / 2**30 for one in choose_plan.leaner(longer))


@pytest.mark.parametrize(("budget", "tiles"), [("8GiB", 2), ("12GiB", 1)])
def test_tiles_where_no_plan_fits_without(budget, tiles, long_steps):
    config = TrainConfig(remat="auto", budget=budget, seq_len=1024)
    ask = lambda one: plans_of_the_long_world(one, "local")
    found, _ = choose_plan.planned(config, ask)
    assert (found.remat, found.model.mlp_tiles) == ("full", tiles)
    ask = lambda one: plans_of_the_long_world(one, "local", 1)
    with pytest.raises(BudgetError) as error:
        choose_plan.planned(config, ask)
    assert error.value.least_bytes == report(long_world(choose_plan.in_tiles(config))).peak_bytes


def test_one_compilation_serves_every_spelling_of_a_plan():
    entries = [
        entry_of(dataclasses.replace(CONFIG, remat=p), "v5e-1") for p in ("dots", "full+dots")
    ]
    assert entries[0] == entries[1]


def test_answers_survive_as_json(result, infeasible):
    same = FitResult.from_json(json.loads(json.dumps(result.as_json())))
    assert same == result and str(same) == str(result)
    same = BudgetError.from_json(json.loads(json.dumps(infeasible.as_json())))
    assert str(same) == str(infeasible) and same.least_bytes == infeasible.least_bytes


@pytest.mark.heavy
def test_fit_asks_the_planner_itself(budget, capsys, tmp_path):
    path = tmp_path / "rows.json"
    main(fit, [*FLAGS, "--remat=auto", f"--budget={budget}", f"--json={path}"])
    (row,) = json.loads(path.read_text())["rows"]
    assert row["plan"] == row["auto"]["plan"] and row["peak_bytes"] <= budget
    capsys.readouterr()
    err = refused(fit, [*FLAGS, "--remat=auto", "--budget=30KB"], capsys)
    assert "arguments[0].params" in err and "the largest buffer there is" in err


@pytest.mark.heavy
@pytest.mark.xdist_group("absent")
def test_an_absent_chip_with_its_own_attention_kernel(tmp_path):
    """Splash attention is traced and compiled where the chip is known; the second time is read."""
    try:
        launch.check_available(parse_target("v5e-1"))
    except launch.Unavailable as error:
        pytest.skip(str(error))
    path = tmp_path / "rows.json"
    code = (
        "import sys\nfrom experiments.cli import main\nfrom experiments.fit import fit\n"
        "main(fit, sys.argv[1:])\nassert 'jax' not in sys.modules"
    )
    flags = ["--num-blocks=3", "--d-model=256", "--batch-size=64", "--seq-len=512"]
    flags += ["--head-dim=64", "--attention=splash", "--target=v5e-1", "--plan=auto"]
    flags += ["--budget=850MiB", f"--json={path}"]
    environment = {"JAXCKPT_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}

    def rows(*more: str) -> list[dict]:
        command = [sys.executable, "-c", code, *flags, *more]
        subprocess.run(command, check=True, env=os.environ | environment)
        return json.loads(path.read_text())["rows"]

    (first,) = rows()
    kept = lambda: {file for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    before = kept()
    # `none` was compiled by the planner, under the name that a plan of one's own has.
    again, none = rows("--plan=none")
    assert again == first and kept() == before
    assert first["peak_bytes"] <= 850 * 2**20 < none["peak_bytes"]
    assert first["fits"] and not none["fits"]
