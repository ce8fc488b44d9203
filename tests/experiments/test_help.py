"""Help: panels, the most used flags first, examples, plain defaults; rare flags on demand."""

import re

import pytest

from experiments import cli, flags
from experiments.cli import main
from experiments.draw import draw
from experiments.fit import fit
from experiments.report import report
from experiments.sweep import sweep
from experiments.train import train

COMMANDS = [train, fit, sweep, draw, report]


def help_of(command, capsys, monkeypatch, *, flag="--help", columns=80) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    main(command, [flag])
    return capsys.readouterr().out


def shown_in(text: str) -> dict[str, list[str]]:
    """Returns the flags of each panel."""
    panels = re.findall(r"╭─ ([\w ]+) ─*╮\n(.*?)╰─", text, re.DOTALL)
    found = {}
    for title, body in panels:
        heads = re.findall(r"^│ [* ] ?(--[a-z0-9-]+)|^│ (--[a-z0-9-]+)", body, re.MULTILINE)
        named = [one or two for one, two in heads]
        found[title] = [name for name in named if not name.startswith("--no-")]
    return found


def test_the_most_used_flags_come_first(capsys, monkeypatch):
    panels = shown_in(help_of(train, capsys, monkeypatch))
    assert [*panels][:3] == ["Most used", "Plan and memory", "Model"]
    assert [*panels][3:] == ["Optimizer", "Data", "Run", "Several processes", "Help"]
    assert panels["Most used"] == [
        *("--config", "--plan", "--budget", "--init", "--data"),
        *("--batch-size", "--seq-len", "--steps", "--out", "--resume"),
    ]


@pytest.mark.parametrize("command", [train, fit, sweep])
def test_rare_flags_are_shown_on_demand_and_every_flag_has_a_panel(command, capsys, monkeypatch):
    usual = shown_in(help_of(command, capsys, monkeypatch))
    every = shown_in(help_of(command, capsys, monkeypatch, flag="--help-all"))
    assert "Parameters" not in every, "a flag that is in no panel of the table"
    names = {name[2:] for row in every.values() for name in row}
    assert names - {name[2:] for row in usual.values() for name in row} == flags.RARE & names
    lines = f"--help-all lists {len(flags.RARE & names)} more flags."
    assert lines in help_of(command, capsys, monkeypatch)


def test_the_table_names_each_flag_once():
    named = [flag for row in flags.PANELS.values() for flag in row]
    assert len(named) == len(set(named)) and set(named) >= flags.RARE | set(flags.USED_BY)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_no_python_in_it_and_ends_with_examples(command, capsys, monkeypatch):
    text = help_of(command, capsys, monkeypatch, flag="--help-all")
    assert not re.search(r"default: *(\(|\[|True|False|None|/)", text)
    fields = [flag.replace("-", "_") for row in flags.PANELS.values() for flag in row]
    assert "`" not in text and not any(name in text for name in fields if "_" in name)
    assert f"Examples:\n  python -m experiments.{command.__name__}" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_lines_of_help_end_where_the_terminal_does(capsys, monkeypatch):
    wide = help_of(train, capsys, monkeypatch, columns=160)
    assert "Its weights" not in wide
    assert "Folder of a Qwen3 as Hugging Face's transformers saves it. The run starts from" in wide


@pytest.mark.parametrize("command", [train, fit, sweep, draw])
def test_plan_and_remat_are_one_flag(command, capsys, monkeypatch):
    assert "--plan --remat" in help_of(command, capsys, monkeypatch)


@pytest.mark.parametrize("given", [["sqrt"], ["--plan", "sqrt"], ["--remat=sqrt"]])
def test_draw_takes_a_plan_by_either_name(given, capsys):
    main(draw, [*given, "--blocks=4"])
    assert capsys.readouterr().out.startswith("sqrt on 4 blocks\n")


def test_a_file_gives_its_plan_to_a_run_and_to_no_comparison(tmp_path):
    path = tmp_path / "x.toml"
    for plan, expected in {"log": {train: "log"}, "auto": {train: "auto", fit: "auto"}}.items():
        path.write_text(f"remat = '{plan}'\n")
        for command in (train, fit, sweep):
            app = cli._app(command, "experiments", with_rare=False)
            found = cli._file_flags([f"--config={path}"], app)
            assert found.get("remat") == expected.get(command), (plan, command)
