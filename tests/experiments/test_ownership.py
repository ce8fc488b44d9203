"""Only what a command wrote is removed or written over: runs, sweeps, pages, pictures, numbers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

from experiments import files
from experiments.claims import claims
from experiments.cli import main
from experiments.config import ConfigError, TrainConfig
from experiments.draw import draw
from experiments.export import export
from experiments.fit import fit
from experiments.report import report
from experiments.sweep import sweep
from experiments.train import train
from experiments.training import record
from tests.experiments import runs
from tests.experiments.test_resume import snapshot

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = (*runs.TINY, f"--data={ROOT / 'README.md'}", "--steps=2", "--save-every=1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def call(capsys, cache):
    """Runs a command in this process; returns its exit code and all that it printed."""

    def call(command, *flags) -> tuple[int, str]:
        capsys.readouterr()
        if command is train:
            flags = (*TINY, f"--compile-cache={cache}", *flags)
        try:
            main(command, list(map(str, flags)))
            code = 0
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        if code == 2:
            assert err.startswith("error: ") and err.count("\n") == 1, err
        return code, out + err

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    """A finished run; tests copy it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    main(train, [*TINY, f"--compile-cache={cache}", f"--out={folder}"])
    return folder


def fill(folder: Path, *names: str) -> dict:
    """Puts files of somebody else's into a folder; returns what is in it."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not of this program\n")
    return snapshot(folder)


OTHERS = [
    ("checkpoints/1/x",),
    ("notes.txt",),
    ("metrics.jsonl", "checkpoints/3/weights"),
    ("config.toml", "rows.jsonl"),
    (".jaxckpt", "checkpoints/1/x"),
    (".hidden",),
]


@pytest.mark.parametrize("names", OTHERS)
@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)])
def test_a_folder_of_somebody_elses_is_never_touched(names, flags, call, tmp_path):
    before = fill(tmp_path / "p", *names)
    code, text = call(train, f"--out={tmp_path / 'p'}", *flags)
    assert code == 2 and "is not empty and no folder of experiments.train" in text
    assert snapshot(tmp_path) == before
    code, text = call(sweep, f"-o={tmp_path / 'p'}")
    assert code == 2 and "is not empty and no folder of experiments.sweep" in text
    assert snapshot(tmp_path) == before


def test_overwriting_leaves_what_is_not_the_runs_own(run, call, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    fill(folder, "notes.txt", "checkpoints/best/weights", "checkpoints/readme.md")
    assert call(train, f"--out={folder}")[0] == 2, "a run is there"
    assert call(train, f"--out={folder}", "--overwrite", "--seed=1")[0] == 0
    for name in ("notes.txt", "checkpoints/best/weights", "checkpoints/readme.md"):
        assert (folder / name).read_text() == "not of this program\n"
    assert runs.checkpoint(folder)[0] == 2 and runs.rows(folder)[0]["config"]["seed"] == 1

    fill(folder, "checkpoints/1000/weights")  # named like a checkpoint of the run
    before = snapshot(folder)
    for flag in ("--overwrite", "--resume"):
        code, text = call(train, f"--out={folder}", flag)
        assert code == 2 and str(folder / "checkpoints/1000") in text
        assert snapshot(folder) == before


def test_a_run_from_before_there_were_marks_goes_on(run, call, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / files.MARK_FILE).unlink()
    assert call(train, f"--out={folder}", "--resume")[0] == 0
    assert call(train, f"--out={folder}", "--overwrite")[0] == 0


def test_permission_for_one_time_is_in_no_record(run, call, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    assert call(train, f"--out={folder}", "--overwrite")[0] == 0
    assert call(train, f"--out={folder}", "--resume")[0] == 0
    kept = tomllib.loads((folder / "config.toml").read_text())
    for found in (kept, runs.rows(folder)[0]["config"]):
        assert not {"overwrite", "resume"} & found.keys()
    before = snapshot(folder)
    code, text = call_with_file(call, folder / "config.toml")
    assert code == 2 and "already holds a run" in text and snapshot(folder) == before
    for name in ("overwrite", "resume"):
        file = tmp_path / f"{name}.toml"
        file.write_text(f"{name} = true\n" + (folder / "config.toml").read_text())
        code, text = call_with_file(call, file)
        assert code == 2 and f"give it as --{name}" in text and snapshot(folder) == before
        file.write_text(f"{name} = false\n" + (folder / "config.toml").read_text())
        assert "already holds a run" in call_with_file(call, file)[1]


def call_with_file(call, file: Path) -> tuple[int, str]:
    return call(lambda_train, f"--config={file}")


def lambda_train(settings: TrainConfig = TrainConfig(), *, config: Path | None = None):
    """`train` without the flags that a test adds to it."""
    train(settings)


def test_what_is_refused_leaves_no_folder(call, tmp_path):
    shape = [flag for flag in TINY if not flag.startswith("--remat")]
    out = f"--out={tmp_path / 'a/b/run'}"
    code, text = call(lambda_train, *shape, "--remat=names:nope", out)  # only a trace tells
    assert code == 2 and "matches no tag" in text and not [*tmp_path.iterdir()]
    (tmp_path / "mine").mkdir()
    code, text = call(train, "--data=nowhere", f"--out={tmp_path / 'mine'}")
    assert code == 2 and [*tmp_path.rglob("*")] == [tmp_path / "mine"], text


@pytest.mark.parametrize(
    "place", ["{}/file/run", "{}/file", "/proc/run", "{}/" + 300 * "x", "{}/a/b/" + 300 * "x"]
)
def test_a_folder_that_cannot_be_is_refused_before_anything_is_read(place, call, tmp_path):
    (tmp_path / "file").write_text("")
    flags = (f"--out={place.format(tmp_path)}", "--data=nowhere")
    code, text = call(lambda_train, *flags)
    assert code == 2 and "nowhere" not in text
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_one_process_writes_to_a_folder(run, call, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    with files.own_folder(folder, "experiments.train", record.METRICS):
        before = snapshot(folder)
        for flag in ("--overwrite", "--resume"):
            code, text = call(train, f"--out={folder}", flag)
            assert code == 2 and "another process is writing to" in text
        assert files.is_locked(folder) and snapshot(folder) == before
    assert not files.is_locked(folder)
    assert call(train, f"--out={folder}", "--resume")[0] == 0


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom experiments.files import own_folder\n"
        "with own_folder(Path(sys.argv[1]), 'experiments.train', 'metrics.jsonl'):\n"
        "    print('locked', flush=True)\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    own = lambda: files.own_folder(tmp_path / "run", "experiments.train", "metrics.jsonl")
    with pytest.raises(ConfigError, match="another process"), own():
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with own():
        assert (tmp_path / "run" / files.MARK_FILE).exists()
    assert not [*tmp_path.iterdir()], "what the killed process made"


def test_an_empty_folder_of_the_users_stays(tmp_path):
    (tmp_path / "run").mkdir()
    code = "from experiments.files import *\nwith own_folder(Path('run'), 'x', 'y'): os._exit(0)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "run" / files.MARK_FILE).exists()
    with files.own_folder(tmp_path / "run", "x", "y"):
        pass
    assert (tmp_path / "run").exists()


def test_runs_that_start_at_once_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    barrier, found = threading.Barrier(8), []

    def start():
        barrier.wait()
        with record.run_folder(TrainConfig(), is_first=True) as folder:
            (folder / record.METRICS).write_text(str(folder))
            found.append(folder)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(set(found)) == 8
    assert all((folder / record.METRICS).read_text() == str(folder) for folder in found)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir())[:2] == ["now", "now-2"]


def test_one_folder_asked_for_by_many_at_once_is_had_by_one(tmp_path):
    barrier, done, refused = threading.Barrier(8), [], []

    def start():
        barrier.wait()
        try:
            with record.run_folder(TrainConfig(out=tmp_path / "a/run"), is_first=True) as folder:
                (folder / record.METRICS).write_text("here")
                done.append(folder)
                release.wait(20)
        except ConfigError as error:
            refused.append(str(error))

    release = threading.Event()
    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(done) + len(refused) < 8:
        time.sleep(0.01)
    release.set()
    for thread in threads:
        thread.join()
    assert len(done) == 1 and all("another process is writing" in text for text in refused)


def test_without_locks_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "fcntl", None)
    with files.own_folder(tmp_path / "run", "experiments.train", record.METRICS):
        pass
    assert "keep other processes from writing to it" in capsys.readouterr().err


ODD_NAMES = [
    "r[1]",
    "a?b*",
    "new\nline",
    "ünï 🎉 文",
    "q'\"",
    "-x",
    " lead ",
    "%41#x?y",
    "{x}",
    "**",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_can_be_read_that_could_be_written(name, call, tmp_path):
    folder = tmp_path / name
    assert call(train, f"--out={folder}")[0] == 0
    assert runs_in(folder) == {1, 2}
    code, text = call(train, f"--out={folder}", "--resume")
    assert code == 0 and "resumed at step 2" in text
    assert call(train, f"--out={folder}", "--overwrite")[0] == 0
    code, text = call(export, f"--run={folder}", "-o", tmp_path / f"hf {name}", "--step=1")
    assert code == 0, text
    code, text = call(report, f"--runs={folder}", f"-o={tmp_path / name}.html")
    assert code == 0, text
    left = {folder, tmp_path / f"hf {name}", tmp_path / f"{name}.html"}
    assert {*tmp_path.iterdir()} == left


def runs_in(folder: Path) -> set[int]:
    return {int(path.name) for path in (folder / "checkpoints").iterdir()}


def test_a_backslash_is_refused_for_it_would_be_a_slash(call, tmp_path):
    code, text = call(train, f"--out={tmp_path}/a\\b")
    assert code == 2 and "below a backslash" in text and not [*tmp_path.iterdir()]


WRITERS = [
    (draw, ("sqrt", "--blocks=4"), "-o", "plan.txt"),
    (draw, ("sqrt", "--blocks=4"), "-o", "plan.svg"),
    (draw, ("sqrt", "--blocks=4"), "-o", "plan.png"),
    (report, ("{run}",), "-o", "report.html"),
    (report, ("{run}", "-o", "{out}/other.html"), "--figure", "figure.svg"),
    (report, ("{run}", "-o", "{out}/other.html"), "--figure", "figure.png"),
    (fit, (*runs.SHAPE, "--plan=none"), "--json", "rows.json"),
    (claims, ("--no-compile", "--numbers={out}/n.json"), "-o", "claims.md"),
]


@pytest.mark.parametrize("command, flags, flag, name", WRITERS)
def test_files_are_written_over_only_by_those_who_wrote_them(
    command, flags, flag, name, run, call, tmp_path
):
    if name.endswith((".svg", ".png")):
        pytest.importorskip("matplotlib")
    flags = [text.format(run=run, out=tmp_path) for text in flags]
    path = tmp_path / name
    path.touch()  # an empty file has nothing to lose
    for _ in range(2):
        code, text = call(command, *flags, f"{flag}={path}")
        assert code == 0 and path.stat().st_size, text
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert not list(tmp_path.glob(".part-*"))
    for content in (b"mine\n", b"\0\xff" * 9000):
        path.write_bytes(content)
        code, text = call(command, *flags, f"{flag}={path}")
        assert code == 2 and "was not written by this command" in text
        assert path.read_bytes() == content
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    assert call(command, *flags, f"{flag}={path}")[0] == 2 and path.is_symlink()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_numbers_of_something_else_are_not_written_over(call, tmp_path):
    path = tmp_path / "numbers.json"
    path.write_text(text := json.dumps({"rows": {}, "mine": 1}))
    code, said = call(claims, "--no-compile", f"--numbers={path}", f"-o={tmp_path / 'c.md'}")
    assert code == 2 and "does not hold the numbers of claims" in said
    assert path.read_text() == text and not (tmp_path / "c.md").exists()


def test_a_tilde_is_the_home_folder_wherever_it_stands(run, call, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(run, home / "run")
    (home / "text.txt").write_text((ROOT / "README.md").read_text())
    (home / "x.toml").write_text('data = "~/text.txt"\nout = "~/b/run"\ncompile_cache = "~/c"\n')
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(home))
    shape = [flag for flag in TINY if not flag.startswith("--data")]
    assert call(lambda_train, *shape, "--config=~/x.toml")[0] == 0
    kept = tomllib.loads((home / "b/run/config.toml").read_text())
    assert kept["data"] == str(home / "text.txt") and kept["out"] == str(home / "b/run")
    assert (home / "c").is_dir()
    assert call(draw, "sqrt", "--blocks=4", "--out=~/plan.txt")[0] == 0
    assert call(report, "~/run", "-o", "~/r.html")[0] == 0
    assert call(export, "~/run", "-o", "~/hf")[0] == 0
    assert call(fit, *runs.SHAPE, "--plan=none", "--json=~/rows.json")[0] == 0
    assert not [*(tmp_path / "here").iterdir()]
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where nobody knows the user
    code, text = call(train, "--out=~/run")
    assert code == 2 and "there is no home folder" in text and not [*(tmp_path / "here").iterdir()]


def test_paths_in_records_are_absolute(call, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text((ROOT / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    shape = [flag for flag in TINY if not flag.startswith("--data")]
    flags = ("--data=*.txt", "--out=run", "--compile-cache=c")
    assert call(lambda_train, *shape, *flags)[0] == 0
    for found in (
        tomllib.loads((tmp_path / "run/config.toml").read_text()),
        runs.rows(tmp_path / "run")[0]["config"],
    ):
        assert found["data"] == str(tmp_path / "*.txt") and found["out"] == str(tmp_path / "run")
        assert found["compile_cache"] == str(tmp_path / "c")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = ("--config=../run/config.toml", f"--out={tmp_path / 'again'}")
    assert call(lambda_train, *again)[0] == 0, "the record repeats the run from any folder"
