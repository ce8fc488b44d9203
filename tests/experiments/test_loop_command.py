"""`experiments.loop`: it learns, says what its gradient takes, draws it, refuses in one line."""

import re

import pytest

from experiments.cli import main
from experiments.loop import loop


def sizes(printed: str) -> list[float]:
    units = {"KiB": 1, "MiB": 1024}
    found = re.findall(r"([\d.]+) (KiB|MiB)", printed.splitlines()[0])
    return [float(number) * units[unit] for number, unit in found]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["memory", "diffusion"])
def test_it_learns_within_less_memory(task, capsys):
    main(loop, [f"--task={task}", "--length=64", "--steps=30", "--remat=log"])
    printed = capsys.readouterr().out
    ours, plain = sizes(printed)
    assert ours < 0.6 * plain
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 5 and losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_it_draws_memory(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "memory.svg"
    main(loop, ["--length=16", "--steps=1", "-o", str(path)])
    text = path.read_text()
    for label in ("none", "two scans by hand", "sqrt", "steps of the loop"):
        assert label in text
    assert f"drawn: {path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--remat=sqrtt"], "sqrt"),
        (["--length=0"], "length is 0; the least is 1"),
        (["--steps=0"], "steps is 0; the least is 1"),
        (["--length=8", "--remat=binomial:9"], "9"),
        (["--task=rnn"], "memory"),
        (["-o", "memory.pdf"], ".svg"),
    ],
)
def test_bad_input(flags, said, capsys):
    with pytest.raises(SystemExit) as exit:
        main(loop, flags)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
