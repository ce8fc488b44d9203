"""A configuration file is for every command: train, fit and sweep; so is the record of any run."""

import json
from pathlib import Path

import pytest
from cyclopts import App

from experiments import cli
from experiments.cli import main
from experiments.fit import _cases as fit_cases
from experiments.fit import fit
from experiments.sweep import _cases as sweep_cases
from experiments.sweep import sweep
from experiments.train import train
from tests.experiments import runs

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.toml"))
DATA = f"--data={ROOT / 'README.md'}"


def taken(command, *flags, monkeypatch) -> dict:
    """Returns what a command would be called with; nothing runs."""
    found = {}
    parse = App.parse_args

    def parsed(self, *args, **options):
        _, bound, rest = parse(self, *args, **options)
        found.update(bound.arguments)
        return (lambda *_, **__: None), bound, rest

    with monkeypatch.context() as patched:
        patched.setattr(App, "parse_args", parsed)
        main(command, list(map(str, flags)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("command", [train, fit, sweep])
def test_each_shipped_file_is_for_every_command(path, command, monkeypatch, tmp_path):
    flags = [f"--config={path}", *([f"-o={tmp_path / 'sweep'}"] if command is sweep else [])]
    found = taken(command, *flags, monkeypatch=monkeypatch)
    shipped = cli.load_toml(path)
    settings = found["settings"]
    assert settings.model.num_blocks == shipped["num-blocks"]
    assert settings.batch_size == shipped["batch-size"] and settings.seq_len == shipped["seq-len"]
    if command is train:
        assert settings.plan.num_blocks == settings.model.num_blocks
        assert str(settings.remat) == shipped["remat"]
    else:
        cases = fit_cases if command is fit else sweep_cases
        names = ("settings", "flags") if command is fit else ("flags", "settings")
        usual = {"flags": found.get("flags", taken_flags(command)), "settings": settings}
        assert len(cases(*(usual[name] for name in names))) > 3


def taken_flags(command):
    from experiments.fit import FitFlags
    from experiments.sweep import SweepFlags

    return FitFlags() if command is fit else SweepFlags()


@pytest.mark.heavy
def test_the_small_file_and_a_runs_record_run_under_every_command(tmp_path):
    cache = f"--compile-cache={tmp_path / 'cache'}"
    file = [f"--config={ROOT / 'configs/small.toml'}", *runs.SHAPE]
    of_run = [cache, DATA, "--validation-batches=1"]
    one_time = ["--steps=2", "--save-every=1", "--keep=1", "--sample", "--explain", "--overwrite"]
    main(train, [*file, *of_run, *one_time, f"--out={tmp_path / 'run'}"])
    for name, flags in {
        "file": file,
        "record": [f"--config={tmp_path / 'run/config.toml'}"],
    }.items():
        rows = tmp_path / f"{name}.json"
        main(fit, [*flags, "--plan=none", f"--json={rows}"])
        assert [row["plan"] for row in json.loads(rows.read_text())["rows"]] == ["none"]
        folder = tmp_path / f"{name} sweep"
        plans = ["--plan=none", "--remat=sqrt"]
        main(sweep, [*flags, DATA, *plans, "--depth=3", "--run-steps=2", f"-o={folder}"])
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        assert [row["plan"] for row in rows] == ["none", "sqrt"]
        assert all(len(row["losses"]) == 2 and "error" not in row for row in rows)
        out = tmp_path / f"{name} run"
        main(train, [*flags, *([*of_run, "--steps=2"] if name == "file" else []), f"--out={out}"])
        assert runs.last_step(out) == 2
        row = folder / rows[0]["run"]
        main(train, [f"--config={row / 'config.toml'}", f"--out={tmp_path / f'{name} again'}"])


@pytest.mark.parametrize(
    "command, flag",
    [(sweep, "--out=x"), (sweep, "--keep=2"), (fit, "--out=x"), (fit, "--no-resume")],
)
def test_a_flag_that_a_command_does_not_use_is_refused(command, flag, tmp_path, capsys):
    folder = [f"-o={tmp_path / 'sweep'}"] if command is sweep else []
    with pytest.raises(SystemExit) as stop:
        main(command, [flag, *folder])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and flag.partition("=")[0] in err and err.count("\n") == 1


@pytest.mark.parametrize("command", [train, fit, sweep])
@pytest.mark.parametrize("text", ["stepz = 3", "[remat]\na = 1", "[run]\nsteps = 3"])
def test_what_no_command_knows_is_refused_by_all(command, text, tmp_path, capsys):
    path = tmp_path / "x.toml"
    path.write_text(text)
    folder = [f"-o={tmp_path / 'sweep'}"] if command is sweep else []
    with pytest.raises(SystemExit) as stop:
        main(command, [f"--config={path}", *folder])
    assert stop.value.code == 2 and str(path) in capsys.readouterr().err


def test_a_files_plan_is_plan_or_remat_and_never_both(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.toml"
    path.write_text('plan = "full"')
    assert taken(train, f"--config={path}", monkeypatch=monkeypatch)["settings"].remat == "full"
    path.write_text('plan = "full"\nremat = "sqrt"')
    with pytest.raises(SystemExit) as stop:
        main(train, [f"--config={path}"])
    assert stop.value.code == 2 and "plan and remat, which are one" in capsys.readouterr().err


def test_a_file_as_windows_writes_it(tmp_path, monkeypatch):
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xef\xbb\xbfsteps = 7\r\n[model]\r\nnum_blocks = 3\r\n")
    found = taken(train, f"--config={path}", monkeypatch=monkeypatch)["settings"]
    assert (found.steps, found.model.num_blocks) == (7, 3)
