"""The command line of experiments.train: what it refuses, in one line, early, writing nothing."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def train(*flags, cwd=None):
    """Runs the command line; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.train", *map(str, flags)],
        cwd=cwd or ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


TINY = (
    "--num-blocks=3",
    "--d-model=16",
    "--num-heads=2",
    "--num-kv-heads=1",
    "--head-dim=8",
    "--d-ff=32",
    "--batch-size=2",
    "--seq-len=16",
    "--validation-batches=1",
)


def refused(done, tmp_path):
    """Asserts one plain line, code 2 and nothing written; returns the line."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr and "╭" not in done.stderr
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "runs").exists()
    return done.stderr


EARLY = [
    (["--remat=sqrtt"], "did you mean 'sqrt'?"),
    (["--remat=uniform:0"], "the least is uniform:1"),
    (["--remat=sqrt+dots"], "full, uniform, every take dots"),
    (["--remat=5xfull"], "covers 5 blocks, the stack has 8"),
    (["--remat=auto"], "needs a budget: --budget=auto is all that the device can use"),
    (["--remat=auto", "--budget=0"], "budget: size '0' is not at least one byte; auto is"),
    (["--remat=auto", "--budget=16GBB"], "unit 'GBB' (did you mean 'GB'?); valid: B, KB"),
    (["--host-budget=9GBB"], "host_budget: size '9GBB': unit 'GBB' (did you"),
    (["--calibrate"], "it is of plan 'auto' alone"),
    (["--remat=2xauto/full", "--budget=1GiB"], "auto chooses the whole plan, so it stands alone"),
    (["--steps=ten"], '--steps: unable to convert "ten" into int'),
    (["--steps=0"], "steps is 0; the least is 1"),
    (["--stepz=3"], "Did you mean --steps?"),
    (["--steps"], "--steps requires an argument"),
    (["--dtype=bf17"], 'Did you mean "bf16"?'),
    (["--num-kv-heads=3"], "does not divide num_heads 4; valid: 1, 2, 4"),
    (["--head-dim=3"], "even, such as 4"),
    (["--dropout=1.5"], "a rate in [0, 1), not 1.5"),
    (["--config=configs/smal.toml"], "did you mean 'configs/small.toml'?"),
    (["--data=README.mdd"], "did you mean 'README.md'?"),
    (["--data=nowhere/*.txt"], "matches no file"),
    (["extra"], "extra"),
    (["--mesh=fdsp=4"], "mesh 'fdsp=4' has no axis 'fdsp' (did you mean 'fsdp'?)"),
    (["--mesh=fsdp=3"], "data times fsdp is 3, which does not divide batch_size 16"),
    (["--mesh=tensor=4"], "tensor 4 does not divide num_kv_heads 2; valid: 1, 2"),
    (["--processes=2"], "2 processes need --coordinator host:port and --process-id"),
]


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", EARLY)
def test_refused_before_jax_is_imported(flags, message, tmp_path):
    code = (
        "import sys\n"
        "from experiments.cli import main\n"
        "from experiments.train import train\n"
        "try:\n"
        "    main(train, sys.argv[1:])\n"
        "finally:\n"
        "    print('jax' in sys.modules, 'flax' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, f"--out={tmp_path / 'run'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert message in refused(done, tmp_path)
    assert done.stdout == "False False\n"


TOML = [
    ("stepz = 3", "unknown key 'stepz' (did you mean 'steps'?)"),
    (
        "[model]\nnum_block = 3",
        "[model] has an unknown key 'num_block' (did you mean 'num_blocks'?)",
    ),
    ("[modle]\nnum_blocks = 3", "unknown key 'modle' (did you mean 'model'?)"),
    ("steps = 'ten'", "steps = 'ten' is str, where int is needed"),
    ("steps = 2.5", "steps = 2.5 is float, where int is needed"),
    ("steps = true", "steps = True is bool, where int is needed"),
    ("remat = 3", "remat = 3 is int, where str is needed"),
    ("model = 3", "model is a table, written [model]"),
    ("steps = ", "is not TOML"),
    ("remat = 'sqrtt'", "did you mean 'sqrt'?"),
    ("[model]\ndtype = 'f17'", "dtype"),
]


@pytest.mark.slow
@pytest.mark.parametrize("text, message", TOML)
def test_wrong_toml(text, message, tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(text)
    line = refused(train(f"--config={path}", f"--out={tmp_path / 'run'}"), tmp_path)
    assert message in line


@pytest.mark.parametrize(
    "content, message",
    [(b"", "is empty or not text"), (b"short", "a window of --seq-len"), (b"\0\1\2", "not text")],
)
def test_wrong_data(content, message, tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    line = refused(train(f"--data={path}", f"--out={tmp_path / 'run'}"), tmp_path)
    assert message in line


@pytest.mark.slow
def test_a_name_that_no_block_has(tmp_path):
    """This needs the model, so JAX is imported; still one line and nothing written."""
    line = refused(train("--remat=names:nope", f"--out={tmp_path / 'run'}", *TINY), tmp_path)
    assert "names:nope matches no tag of the block" in line
    assert "it has: attn, gate, k, mid, q, up, v" in line


@pytest.mark.slow
def test_a_run_leaves_its_record(tmp_path):
    out = tmp_path / "run"
    done = train("--remat=uniform:2+dots", f"--out={out}", "--steps=4", "--validate-every=2", *TINY)
    assert done.returncode == 0, done.stderr
    assert "predicted peak" in done.stdout and "step 4/4" in done.stdout
    header, *rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert header["plan"] == "3xuniform:2+dots"
    assert header["predicted_peak_bytes"] > 0 and header["versions"]["jax"]
    assert len(header["corpus_sha256"]) == 64
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(row["step_seconds"] > 0 and row["tokens_per_second"] > 0 for row in steps)
    assert [row["step"] for row in rows if "validation_loss" in row] == [2, 4]
    # The configuration as run repeats the run.
    again = train(f"--config={out / 'config.toml'}", f"--out={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    losses = [
        json.loads(line) for line in (tmp_path / "again/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["loss"] for row in losses if "loss" in row] == [row["loss"] for row in steps]
    # A folder that holds a run is not written to by accident.
    before = (out / "metrics.jsonl").read_text()
    refused_again = train(f"--out={out}", "--steps=1", *TINY)
    assert refused_again.returncode == 2 and "already holds a run" in refused_again.stderr
    assert (out / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("steps = 2\nremat = 'log'\n[model]\nnum_blocks = 3\n")
    done = train(f"--config={path}", f"--out={tmp_path / 'run'}", *TINY, "--remat=full")
    assert done.returncode == 0, done.stderr
    header = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert header["plan"] == "3xfull" and header["config"]["steps"] == 2


def test_default_is_the_file_in_configs():
    from experiments.config import TrainConfig, load_toml

    flags = load_toml(ROOT / "configs/small.toml")
    default = TrainConfig().to_dict()
    flat = {**default, **default["model"], **default["optimizer"]}
    assert {key.replace("-", "_"): value for key, value in flags.items()}.items() <= flat.items()


def test_help_names_every_flag():
    done = train("--help")
    assert done.returncode == 0
    for flag in ("--remat", "--steps", "--batch-size", "--seq-len", "--dtype", "--seed", "--out"):
        assert flag in done.stdout


@pytest.mark.slow
def test_no_home_and_a_terminal_of_few_letters(tmp_path):
    """An unknown user without HOME runs without a cache, and any path can be printed."""
    data = tmp_path / "文.txt"
    data.write_bytes((ROOT / "README.md").read_bytes())
    code = (
        "import pwd, sys\n"
        "def nobody(_):\n    raise KeyError\n"
        "pwd.getpwuid = nobody\n"
        "from experiments.cli import main\nfrom experiments.train import train\n"
        "main(train, sys.argv[1:])\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "latin-1"}
    flags = [*TINY, "--steps=1", f"--data={data}", f"--out={tmp_path / 'run 文'}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"compiled steps are not kept on disk: there is no home folder" in done.stdout
    assert b"\\u6587.txt" in done.stdout and (tmp_path / "run 文/metrics.jsonl").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run 文", "文.txt"]


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1, 2**63])
def test_a_seed_that_jax_would_cut_short(seed, tmp_path):
    line = refused(train(f"--seed={seed}", f"--out={tmp_path / 'run'}", *TINY), tmp_path)
    assert f"seed is {seed}; the most is 4294967295" in line


@pytest.mark.parametrize(("number", "word"), [("SIGTERM", "terminated"), ("SIGINT", "interrupted")])
def test_a_command_that_is_stopped_leaves_nothing_half_written(number, word, tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nwrite = Path.write_bytes\n"
        # Who was started in a shell's background is deaf to Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def stopped(self, content):\n"
        "    write(self, content[:9])\n    os.kill(os.getpid(), getattr(signal, sys.argv[1]))\n"
        "Path.write_bytes = stopped\n"
        "from experiments.cli import main\nfrom experiments.draw import draw\n"
        "main(draw, ['full', '--blocks=3', '-o', sys.argv[2]])\n"
    )
    command = [sys.executable, "-c", code, number, str(tmp_path / "plan.txt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.Signals[number], f"error: {word}\n")
    assert not [*tmp_path.iterdir()]
