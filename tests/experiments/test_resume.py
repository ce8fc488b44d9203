"""Runs that are stopped, killed or out of disk go on as if nothing had happened."""

import os
import random
import re
import signal

import numpy as np
import pytest

from tests.experiments import runs

pytestmark = pytest.mark.slow

COUNTED = "tests.experiments.counted"
KILLS = int(os.environ.get("JAXCKPT_KILLS", "5"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run of 12 steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    runs.train("--steps=12", "--save-every=1", "--validate-every=4", f"--out={folder}", cache=cache)
    assert len(runs.losses(folder)) == 12 + 3
    return folder


FLAGS = ("--save-every=1", "--validate-every=4")


@pytest.mark.parametrize("plan", ["full", "sqrt"])
def test_a_run_goes_on_bit_equal_under_another_plan(plan, whole, cache, tmp_path):
    out = f"--out={tmp_path / 'run'}"
    runs.train("--steps=5", "--decay-steps=12", *FLAGS, out, cache=cache)
    text = runs.train("--steps=12", *FLAGS, out, "--resume", f"--remat={plan}", cache=cache)
    assert "resumed at step 5" in text
    heads = [row for row in runs.rows(tmp_path / "run") if "versions" in row]
    assert [head.get("resumed_from_step") for head in heads] == [None, 5]
    # The run of five steps ended with a validation that the whole run did not make.
    kept = [row for row in runs.losses(tmp_path / "run") if row[0] != 5]
    assert kept == [row for row in runs.losses(whole) if row[0] != 5]
    assert runs.checkpoint(tmp_path / "run")[0] == 12
    state, expected = runs.checkpoint(tmp_path / "run")[1], runs.checkpoint(whole)[1]
    assert all((state[name] == expected[name]).all() for name in expected)


def test_a_decay_that_follows_the_steps_goes_on_with_them(cache, tmp_path):
    out = f"--out={tmp_path / 'run'}"
    runs.train("--steps=2", "--save-every=1", out, cache=cache)
    text = runs.train("--steps=4", "--save-every=1", out, "--resume", cache=cache)
    assert "the learning rate decays over 4 steps, before over 2" in text
    assert [step for step, _ in runs.losses(tmp_path / "run")][-2:] == [4, 4]
    # A decay that was set is not a consequence of the steps.
    err = refused("--steps=4", "--decay-steps=9", out, "--resume", cache=cache)
    assert "optimizer.decay_steps was 4, is 9" in err


@pytest.mark.heavy
def test_a_run_on_a_mesh_goes_on_for_more_steps_on_another(cache, tmp_path):
    """The two commands of docs/many_chips.md, at a size for a test."""
    page = (runs.ROOT / "docs/many_chips.md").read_text()
    pattern = r"^python -m experiments.train (.*--out runs/a.*)$"
    commands = [line.split() for line in re.findall(pattern, page, re.MULTILINE)]
    assert len(commands) == 2
    small: dict[str, str] = {"100": "4", "50": "2", "200": "8", "runs/a": str(tmp_path / "run")}
    for words in commands:
        runs.train(*_joined([small.get(word, word) for word in words]), cache=cache, devices=8)
    assert runs.last_step(tmp_path / "run") == 8


def _joined(words: list[str]) -> list[str]:
    """Returns flags with their values as single words, `--steps=4`."""
    return " ".join(words).replace(" --", "\0--").replace(" ", "=").split("\0")


@pytest.mark.heavy
def test_a_run_goes_on_with_another_number_of_devices(whole, cache, tmp_path):
    out = f"--out={tmp_path / 'run'}"
    runs.train("--steps=5", "--decay-steps=12", *FLAGS, out, cache=cache, devices=2)
    runs.train("--steps=12", *FLAGS, out, "--resume", cache=cache, devices=4)
    state, expected = runs.checkpoint(tmp_path / "run")[1], runs.checkpoint(whole)[1]
    assert all((state[name] == expected[name]).all() for name in expected)


@pytest.mark.heavy
def test_a_run_goes_on_with_its_batch_in_parts(tmp_path, cache):
    """Sums of gradients associate differently, so this is equal to float tolerance."""
    ends = []
    for name, flags in {"whole": [], "parts": ["--accumulate=2", "--remat=log"]}.items():
        out = f"--out={tmp_path / name}"
        first = ("--steps=2", "--decay-steps=6", "--dropout=0", "--save-every=2", out)
        runs.train(*first, cache=cache)
        runs.train("--steps=6", "--dropout=0", out, "--resume", *flags, cache=cache)
        ends.append([loss for _, loss in runs.losses(tmp_path / name)])
    assert np.allclose(*ends, rtol=1e-5) and len(set(ends[0])) == len(ends[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_where_but_is_not_done(number, whole, cache, tmp_path):
    folder = tmp_path / "run"
    process = runs.start("--steps=100000", "--decay-steps=12", f"--out={folder}", cache=cache)
    runs.wait_for(process, lambda: runs.last_step(folder) >= 3)
    process.send_signal(number)
    code, out, err = runs.finish(process)
    assert code == 128 + number and not err, err
    step = runs.checkpoint(folder)[0]
    assert f"{signal.Signals(number).name}: saved step {step} in {folder / 'checkpoints'}" in out
    assert "Traceback" not in err


def test_a_second_signal_exits_at_once(cache, tmp_path):
    folder = tmp_path / "run"
    # A step that takes long, so that both signals fall into it.
    process = runs.start(
        "--steps=9", "--batch-size=512", "--seq-len=256", f"--out={folder}", cache=cache
    )
    runs.wait_for(process, lambda: runs.last_step(folder) >= 1)
    # Two signals that are there at once, so that nothing is done between them.
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        process.send_signal(number)
    code, _, _ = runs.finish(process)
    assert code in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert not (folder / "checkpoints").exists()


def goes_on(folder) -> list[str]:
    """Returns `--resume` where a checkpoint is complete; Orbax renames it when it is."""
    complete = any(path.name.isdigit() for path in (folder / "checkpoints").glob("*"))
    return ["--resume"] if complete else ["--overwrite"]


def watched_run(folder, cache, count, kill_at: int) -> bool:
    """Starts or resumes a run and has it killed; returns False if it came to its end first."""
    watched = ("tests.experiments.watched", str(kill_at), str(count), str(folder))
    flags = ("--steps=12", *FLAGS, f"--out={folder}", *goes_on(folder))
    code, _, err = runs.finish(runs.start(*flags, cache=cache, module=watched))
    assert code in (0, -signal.SIGKILL), err
    return code != 0


@pytest.mark.heavy
def test_killed_at_random_moments(whole, cache, tmp_path):
    """SIGKILL between any two operations on files; every time the run goes on and ends equal."""
    count, rng = tmp_path / "count", random.Random(0)
    folder, ended, resumed = tmp_path / "run0", 0, 0
    assert not watched_run(folder, cache, count, kill_at=-1)
    runs.assert_same_end(folder, whole)
    operations = int(count.read_text())
    assert operations > 100, "a save after each of 12 steps"
    # The first is late, so that there is something to go on from; the others are anywhere.
    moments = [9 * operations // 10, *(rng.randrange(1, operations) for _ in range(KILLS - 1))]
    folder = tmp_path / "run1"
    for moment in moments:
        while not watched_run(folder, cache, count, moment):
            runs.assert_same_end(folder, whole)
            ended += 1
            folder = tmp_path / f"run{ended + 1}"
        resumed += goes_on(folder) == ["--resume"]
    runs.train("--steps=12", *FLAGS, f"--out={folder}", *goes_on(folder), cache=cache)
    runs.assert_same_end(folder, whole)
    assert resumed >= 1, "no kill left a checkpoint to resume from"
    print(f"{KILLS} kills, {resumed} times resumed, {ended + 2} runs ended equal")


def test_resuming_a_finished_run_adds_no_rows_but_its_own(whole, cache):
    before = runs.losses(whole)
    text = runs.train("--steps=12", *FLAGS, f"--out={whole}", "--resume", cache=cache)
    assert runs.losses(whole) == before and f"validation loss {before[-1][1]:.4f}" in text


def test_a_full_disk_ends_with_one_line_and_leaves_the_last_checkpoint(whole, cache, tmp_path):
    folder = tmp_path / "run"
    runs.train("--steps=4", "--decay-steps=12", *FLAGS, f"--out={folder}", cache=cache)

    flags = ("--steps=12", *FLAGS, f"--out={folder}", "--resume")
    code, _, err = runs.finish(runs.start(*flags, cache=cache, largest_file_kib=40))
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and "Traceback" not in err, err
    assert "cannot save the checkpoint" in lines[0]
    assert runs.checkpoint(folder)[0] == 4
    runs.train(*flags, cache=cache)
    assert runs.checkpoint(folder)[0] == 12


def refused(*flags, **options) -> str:
    code, _, err = runs.finish(runs.start(*flags, **options))
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    return err


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


DIFFERENT = [
    (["--d-model=24"], "model.d_model was 16, is 24"),
    (["--learning-rate=0.5"], "optimizer.learning_rate was 0.003, is 0.5"),
    (["--seed=3", "--batch-size=8"], "batch_size was 4, is 8; seed was 0, is 3"),
    (["--decay-steps=13"], "optimizer.decay_steps was 12, is 13"),
    (["--data=README.md"], "corpus was"),
]


def test_another_run_is_refused_with_what_differs(whole, cache):
    before = snapshot(whole)
    for flags, message in DIFFERENT:
        steps = [] if any("steps" in flag for flag in flags) else ["--steps=12"]
        err = refused(*steps, *flags, f"--out={whole}", "--resume", cache=cache)
        assert "the checkpoint is of another run" in err and message in err
    assert snapshot(whole) == before


def test_folders_that_cannot_be_resumed(whole, cache, tmp_path):
    missing = refused("--steps=12", f"--out={tmp_path / 'no'}", "--resume", cache=cache)
    assert "holds no run to resume" in missing and not (tmp_path / "no").exists()
    assert "needs --out" in refused("--resume", cache=cache)
    assert "name one" in refused("--resume", "--overwrite", f"--out={whole}", cache=cache)

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    resume = ("--steps=12", f"--out={folder}", "--resume")
    assert "holds no complete checkpoint" in refused(*resume, cache=cache)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/notes.txt").write_text("not a checkpoint")
    assert "holds no complete checkpoint" in refused(*resume, cache=cache)
    torn = folder / "checkpoints/7"
    torn.mkdir()
    (torn / "commit_success.txt").write_text("")
    (torn / "_CHECKPOINT_METADATA").write_text("{}")
    before = snapshot(folder)
    err = refused(*resume, cache=cache)
    assert "checkpoint 7 in" in err and "cannot be read" in err
    assert snapshot(folder) == before


def test_steps_with_gradients_that_are_not_finite(cache, tmp_path):
    folder = tmp_path / "run"
    process = runs.start(
        "--steps=40",
        "--learning-rate=1e30",
        "--warmup-steps=0",
        "--max-skipped=5",
        f"--out={folder}",
        cache=cache,
    )
    code, _, err = runs.finish(process)
    assert code == 1 and err.count("\n") == 1, err
    assert "gradients were not finite for 5 steps in a row" in err
    skipped = [row["skipped"] for row in runs.rows(folder) if "skipped" in row]
    assert skipped[-5:] == [1, 2, 3, 4, 5] and skipped[0] == 0
    assert runs.rows(folder)[-1]["gradient_norm"] is None


def test_a_second_start_takes_the_compiled_step_from_the_cache(tmp_path):
    hits = []
    for name in ("cold", "warm"):
        flags = ("--steps=1", f"--out={tmp_path / name}")
        process = runs.start(*flags, cache=tmp_path / "cache", module=(COUNTED,))
        code, out, err = runs.finish(process)
        assert code == 0, err
        hits.append(int(out.split()[-1]))
    assert hits[0] == 0 < hits[1], hits


def test_accumulate_that_does_not_divide_the_batch(cache, tmp_path):
    err = refused("--accumulate=3", f"--out={tmp_path / 'run'}", cache=cache)
    assert "accumulate 3 does not divide batch_size 4; valid: 1, 2, 4" in err


def test_sample_and_tensorboard(cache, tmp_path):
    folder = tmp_path / "run"
    text = runs.train("--steps=2", "--sample", "--tensorboard", f"--out={folder}", cache=cache)
    assert "the model goes on after the bar" in text
    assert list(folder.glob("events.out.tfevents.*"))


def test_tensorboard_without_its_extra(cache, tmp_path):
    (tmp_path / "tensorboardX.py").write_text("raise ModuleNotFoundError(name='tensorboardX')")
    out = f"--out={tmp_path / 'run'}"
    err = refused("--tensorboard", out, cache=cache, first_path=tmp_path)
    assert "pip install -e '.[tensorboard]'" in err and not (tmp_path / "run").exists()
