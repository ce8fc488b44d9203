"""Wrong command lines, a row each: one line on stderr with its cure, code 2, nothing written."""

import importlib
import shlex

import pytest

from experiments.cli import main
from jaxckpt.absent import launch
from tests.experiments import runs

SMALL = " ".join(runs.SHAPE)
MAKES_FOLDER = "`hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B` makes one"
CONFIGS = ("configs/small.toml", "configs/qwen3_0p6b.toml")
WRONG = [
    # Plans.
    ("train --remat=sqrtt", "'sqrtt' is not a schedule or policy (did you mean 'sqrt'?); valid: "),
    ("train --plan=sqrtt", "'sqrtt' is not a schedule or policy (did you mean 'sqrt'?); valid: "),
    ("draw sqt", "'sqt' is not a schedule or policy (did you mean 'sqrt'?); valid: none, full"),
    ("train sqrt", "'sqrt' belongs to no flag (did you mean --remat=sqrt?)"),
    ("fit 4xfull/none", "'4xfull/none' belongs to no flag (did you mean --remat=4xfull/none?)"),
    ("train extra", "'extra' belongs to no flag"),
    ("report runs sqrt", "--out (-o) is missing: HTML file to write."),
    (f"train --remat=names:foo {SMALL}", "names:foo matches no tag of the block; it has: attn,"),
    ("train --remat=auto", "plan 'auto' needs a budget: --budget=auto is all that the device can"),
    ("fit --plan auto", "plan 'auto' needs a budget: --budget=auto is all that the device can use"),
    ("fit --remat auto", "plan 'auto' needs a budget: --budget=auto is all that the device can"),
    ("draw 99xfull --blocks 12", "covers 99 blocks, the stack has 12; leave the last count out"),
    (
        "draw uniform:64",
        "asks for 64 segments, but the stage has 32 blocks; the most is uniform:32",
    ),
    ("draw binomial:0", "binomial:0 asks for 0 carries; the least is binomial:1"),
    ("draw auto", "auto has no schedule of its own; draw the plan that it chose, such as sqrt"),
    ("draw sqrt+dots", "sqrt takes offload:carry, not dots; full, uniform, every take dots"),
    ("draw sqrt --blocks -3", "blocks is -3; the least is 1"),
    ("draw", "PLAN is missing: A checkpointing plan, such as binomial:4."),
    ("sweep -o sweep --plan=full --remat=full", "a plan, budget, depth or target is given twice"),
    # Budgets and numbers.
    ("train --remat=auto --budget=15giga", "unit 'giga'; valid: B, KB, KiB, MB, MiB, GB, GiB"),
    ("fit --plan auto --budget=auto", "which local does not tell; give bytes, such as --budget="),
    (
        f"train --budget=10 --remat=none {SMALL}",
        "KiB more than the budget of 10 B; --remat=",
    ),
    ("train --batch-size=0", "batch_size is 0; the least is 1"),
    ("train --batch-size=abc", 'Invalid value for --batch-size: unable to convert "abc" into int'),
    ("train --num-heads 3", "num_kv_heads 2 does not divide num_heads 3; valid: 1, 3"),
    ("train --steps", "--steps requires an argument: Training steps."),
    # Flags.
    ("train --remt=sqrt", "Unknown option: --remt. Did you mean --remat?"),
    ("train --blocks 3", "Unknown option: --blocks. Did you mean --num-blocks?"),
    ("train -x", "Unknown option: -x. --help-all lists all."),
    ("claims --bogus", "Unknown option: --bogus. --help-all lists all."),
    ("fit --sample", "--sample is a flag of experiments.train; experiments.fit has no use for it"),
    ("fit --tensorboard", "--tensorboard is a flag of experiments.train; experiments.fit has no"),
    ("fit --save-every 3", "--save-every is a flag of experiments.train; experiments.fit has no"),
    ("fit --out x", "--out is a flag of experiments.train; experiments.fit has no use for it"),
    ("fit --resume", "--resume is a flag of experiments.train; experiments.fit has no use for it"),
    (
        "fit --data x",
        "--data is a flag of experiments.train and experiments.sweep; experiments.fit",
    ),
    ("sweep -o sweep --keep=1", "--keep is a flag of experiments.train; experiments.sweep has no"),
    ("sweep -o sweep --explain", "--explain is a flag of experiments.train and experiments.fit; "),
    ("fit --max batchsize", 'Choose from: "batch-size", "seq-len". Did you mean "batch-size"?'),
    # Chips and meshes.
    ("fit --target v5e-2", "'v5e-2' is no v5e slice (it counts chips); valid: v5e-1, v5e-4, v5e-8"),
    ("fit --target h1000", "'h1000' is not known (did you mean 'h100'?); valid: local, v2-8"),
    ("fit --target h100", "h100 needs a compiler that is not installed: pip install -e '"),
    ("train --mesh data=x", "mesh 'data=x': size 'x' of data is no whole number"),
    (
        f"train --mesh data=64 --batch-size=64 {SMALL.replace('--batch-size=4', '')}",
        "; XLA_FLAGS=--xla_force_host_platform_device_count=64 makes a CPU as many",
    ),
    # Files and folders.
    (
        "train --config nope.toml",
        "cannot read configuration 'nope.toml': no such file; there are: ",
    ),
    ("train --config smal.toml", "no such file (did you mean 'configs/small.toml'?); there are: "),
    ("fit --config qwen3_0p6.toml", "(did you mean 'configs/qwen3_0p6b.toml'?); there are: "),
    (
        "train --data /nope/x.txt",
        "--data '/nope/x.txt': no such file or folder; valid: a text file",
    ),
    ("train --init Qwen3-0.6B", f"--init 'Qwen3-0.6B' is no folder; {MAKES_FOLDER}"),
    ("train --resume", "--resume needs --out, the folder of the run to go on with"),
    ("train --resume --out nowhere", "'nowhere' holds no run to resume; leave --resume out"),
    ("export runs -o weights", "'runs' is no folder of a run; experiments.train with --save-every"),
    ("export nowhere -o weights", "'nowhere' is no folder of a run; experiments.train with --save"),
    ("report nowhere -o r.html", "there is no 'nowhere'; python -m experiments.sweep -o sweeps/"),
    ("report sweep -o r.pdf", "'r.pdf' ends in '.pdf'; valid: .html, .htm"),
    (
        "report -o r.html",
        "name at least one folder of a sweep or a run; python -m experiments.sweep",
    ),
    ("draw sqrt -o x.pdf", "'x.pdf' ends in '.pdf'; valid: .txt, .svg, .png"),
    ("sweep --plan full", "--folder (-o) is missing: Folder for the rows."),
    ("sweep --plan full -o /proc/x", "cannot write to the folder '/proc/x'"),
]


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder with the configurations of this project and a text, and no compilers of GPUs."""
    (tmp_path / "configs").mkdir()
    for name in CONFIGS:
        (tmp_path / name).write_text("steps = 3\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "opt").mkdir()
    (tmp_path / "README.md").write_text("def import self: return the of and in for\n" * 300)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_is_there", lambda module: False)
    return tmp_path


# What a budget is compared with is compiled.
_MARKS = {line: pytest.mark.slow for line, _ in WRONG if "--budget=10 " in line}
_ROWS = [pytest.param(*row, id=row[0][:60], marks=_MARKS.get(row[0], ())) for row in WRONG]


@pytest.mark.parametrize("line, message", _ROWS)
def test_a_wrong_command_line_is_one_line(line, message, folder, capsys):
    name, *flags = shlex.split(line)
    if line.endswith(SMALL) and name == "train":
        flags += ["--data=README.md", "--out=run", f"--compile-cache={folder / 'cache'}"]
    command = getattr(importlib.import_module(f"experiments.{name}"), name)
    before = {path for path in folder.rglob("*") if "cache" not in path.parts}
    with pytest.raises(SystemExit) as stop:
        main(command, flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert {path for path in folder.rglob("*") if "cache" not in path.parts} == before


@pytest.mark.parametrize(
    "line", ["train --config nope.toml", "train --data /nope/x.txt", "claims --bogus"]
)
def test_what_is_near_nothing_has_no_guess(line, folder, capsys):
    name, *flags = shlex.split(line)
    with pytest.raises(SystemExit):
        main(getattr(importlib.import_module(f"experiments.{name}"), name), flags)
    error = capsys.readouterr().err
    assert "did you mean" not in error.lower() and "pyproject" not in error


def test_configurations_are_listed_wherever_they_lie(folder, capsys):
    with pytest.raises(SystemExit):
        main(importlib.import_module("experiments.train").train, ["--config=nope.toml"])
    assert all(name in capsys.readouterr().err for name in CONFIGS[:1])
