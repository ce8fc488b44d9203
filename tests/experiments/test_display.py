"""The live line of a run at several widths, its plain lines, and what is said at its end."""

import io
import re

import pytest
from rich.console import Console

from experiments.cli import main
from experiments.train import train
from experiments.training import display
from experiments.training.display import Display, duration, next_commands, waiting
from tests.experiments import runs

ROW = {"step": 149, "loss": 4.84541, "step_seconds": 0.3881, "tokens_per_second": 13281.4}


def at_width(columns: int, **more) -> str:
    """Returns the live line of a terminal without colours, 148 steps and 222 s after the first."""
    console = Console(width=columns, file=io.StringIO(), force_terminal=True, color_system=None)
    shown = Display(150, console)
    shown.step({**ROW, "step": 1})
    shown._first = (1, shown._first[1] - 222)
    shown.step({**ROW, **more})
    with console.capture() as captured:
        console.print(shown)
    (line,) = captured.get().splitlines()
    return line.rstrip()


def test_the_live_line_drops_from_the_right_what_a_terminal_has_no_room_for():
    assert at_width(140, mfu=0.5, hfu=0.55, peak_bytes_in_use=3 * 2**30) == (
        "step 149/150  ━━━━━━━━━━━━━━━━━━━╸  2 s left  loss 4.8454  388 ms  13,281 tokens/s  "
        "MFU 50.0% HFU 55.0%  peak 3.00 GiB"
    )
    assert at_width(80) == (
        "step 149/150  ━━━━━━━━━╸  2 s left  loss 4.8454  388 ms  13,281 tokens/s"
    )
    assert at_width(80, peak_bytes_in_use=3 * 2**30) == at_width(80)
    assert at_width(60) == "step 149/150  ━━━━━━━━━╸  2 s left  loss 4.8454  388 ms"
    assert at_width(50) == "step 149/150  ━━━━━━━━━╸  2 s left  loss 4.8454"
    assert at_width(24) == "step 149/150  ━━━━━━━━━╸"


@pytest.mark.parametrize("columns", range(24, 160))
def test_the_live_line_is_one_line_at_any_width(columns):
    line = at_width(columns, mfu=0.5, hfu=0.55, peak_bytes_in_use=3 * 2**30)
    assert len(line) <= columns and "…" not in line and line.startswith("step 149/150")


def test_plain_lines_are_the_first_the_last_and_every_tenth(capsys):
    with Display(40) as shown:
        for step in range(1, 41):
            shown.step({**ROW, "step": step})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/40" for n in (1, *range(4, 41, 4))]
    assert lines[0] == "step 1/40  loss 4.8454  388 ms  13,281 tokens/s"
    assert lines[-1] == "step 40/40  0 s left  loss 4.8454  388 ms  13,281 tokens/s"


def test_time_left_of_a_resumed_run_is_of_its_own_steps():
    assert display._left(101, 200, (100, 50.0), 52.0) == "3:18 min left"
    assert display._left(100, 200, (100, 50.0), 50.0) == ""


def test_a_terminal_has_its_lines_wrapped_between_words_and_commands_whole():
    console = Console(width=20, file=io.StringIO(), force_terminal=True, color_system=None)
    shown = Display(1, console)
    shown.print("a plan uniform:4+names:gate,up,attn of words")
    shown.print("model   float32 and no flash\n  peak  3 MiB of the device")
    shown.print("python -m experiments.report", whole=True)
    written = console.file.getvalue().splitlines()
    assert [line.rstrip() for line in written] == [
        "a plan",
        "uniform:4+names:gate,up,attn",
        "of words",
        "model   float32 and",
        "        no flash",
        "  peak  3 MiB of the",
        "  device",
        "python -m experiments.report",
    ]


def test_a_spinner_is_of_terminals_alone(capsys):
    with waiting("compiling"):
        pass
    assert capsys.readouterr().out == ""
    file = io.StringIO()
    with waiting("compiling", Console(file=file, force_terminal=True)):
        pass
    assert "compiling" in file.getvalue()


@pytest.mark.parametrize(
    "seconds, text", [(8.6, "9 s"), (59.6, "1:00 min"), (65, "1:05 min"), (7384, "2:03:04 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_what_comes_next_depends_on_whether_there_is_a_checkpoint(tmp_path):
    assert list(next_commands("runs/a b", 10, saved=False)) == [
        "next: python -m experiments.report 'runs/a b' -o report.html",
        "      (--save-every=N keeps checkpoints, for --resume and experiments.export)",
    ]
    assert list(next_commands("runs/a", 10, saved=True)) == [
        "next: python -m experiments.report runs/a -o report.html",
        "      python -m experiments.export runs/a -o weights",
        "      python -m experiments.train --config=runs/a/config.toml --out=runs/a --resume "
        "--steps=20",
    ]


ESCAPE = "\x1b["  # what starts a terminal's commands


@pytest.mark.slow
def test_no_command_of_a_terminal_reaches_a_file(tmp_path, capsys):
    """A whole run, with all that it waits for, as a log file gets it."""
    main(train, [*runs.TINY, "--steps=2", "--data=README.md", f"--out={tmp_path / 'run'}"])
    out, err = capsys.readouterr()
    assert ESCAPE not in out + err and "compiling" not in out and "validating" not in out
    lines = out.splitlines()
    places = [
        next(n for n, line in enumerate(lines) if line.startswith(start))
        for start in ("data ", "memory of one step", "none needs ", "step ready in ", "step 2/2")
    ]
    assert places == sorted(places)
    assert re.fullmatch(r"validation loss \d\.\d{4} nats per token", lines[-4])
    assert re.fullmatch(r"done in \d+ s; peak [\d.]+ KiB predicted", lines[-3])
    assert lines[-2].startswith("next: python -m experiments.report ")
    assert out.count(" compiled in ") == 1 and "host  " not in out and " 0.00 " not in out
