"""Random folders, flags and kills: whatever comes of a run, nothing of anybody else's changes.

After each try the world around the run's own folder is as it was, there is no traceback, a run
that says that it is done is done, and every checkpoint can be read. `JAXCKPT_TRIES` is how many
tries the heavy test makes. A kill comes at an event, the nth file that the run touches in its
folder, and not after some time.
"""

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.train import train
from experiments.training.checkpoints import Checkpoints
from tests.experiments import runs

ROOT = Path(__file__).parents[2]
TRIES = int(os.environ.get("JAXCKPT_TRIES", "500"))
IN_GATE = 10
_A_KILL_IN = 10
_PARTS = 4  # for workers side by side
NAMES = [
    "a",
    "r[1]",
    "b c",
    "q'\"",
    "é🎉文",
    "-x",
    "*",
    "a?",
    "#%41",
    "{y}",
    "~",
    "$HOME",
    ".d",
    "x.npy",
]
ENDINGS = ["", ".txt", ".TXT", ".md", ".jsonl", ".json", ".bin", ".npy", ".toml"]
TEXT = "def import self: return the of and in for\n" * 40
CONTENTS = [
    b"",
    b"\0\1\2" * 50,
    TEXT.encode(),
    TEXT.replace("\n", "\r\n").encode(),
    b"\xef\xbb\xbf" + TEXT.encode(),
    TEXT.encode("utf-16"),
    ("né à la " * 99).encode("latin-1"),
    ("文🎉 " * 99).encode(),
    b'{"text": "one two three"}\n' * 60,
    b'{"text": "torn',
    bytes(range(256)) * 9,
]
KILLED = """
import os, signal, sys
folder, left, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def count(event, args):
    global left
    if event.startswith(("open", "os.", "shutil.")) and args and str(args[0]).startswith(folder):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

sys.addaudithook(count)
from experiments.cli import main
from experiments.train import train

main(train, sys.argv[4:])
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A finished run, which tries find copies of."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    runs.train("--steps=3", "--save-every=1", f"--out={folder}", cache=cache)
    return folder


def state(folder: Path, without: Path | None = None) -> dict[str, object]:
    """Returns what is in a folder: files by their bytes, links by where they lead."""
    found = {}
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(here, name) != without]
        for name in (*folders, *files):
            path = Path(here, name)
            if path == without:
                continue
            key = str(path.relative_to(folder))
            found[key] = (
                os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_bytes()
            )
    return found


class Try:
    """One world, one command line in it, and what has to hold afterwards."""

    def __init__(self, seed: int, world: Path, finished: Path, cache: Path):
        self.rng, self.world, self.finished, self.cache = (
            random.Random(seed),
            world,
            finished,
            cache,
        )
        self.fill(world / "mine", depth=0)
        self.fill(world / "data", depth=0)
        (world / "data/good.txt").write_text(TEXT)
        self.oddness = self.rng.choice([0.0, 0.05, 0.05, 0.3])
        self.choose_out()
        self.choose_flags()

    def pick(self, usual: list, odd: list):
        """Returns one of the usual values, or now and then one of the odd ones."""
        return self.rng.choice(odd if self.rng.random() < self.oddness else usual)

    def fill(self, folder: Path, depth: int):
        """Puts files, folders, links and cycles of links into a folder."""
        folder.mkdir(exist_ok=True)
        for _ in range(self.rng.randrange(1, 5)):
            name = self.rng.choice(NAMES) + self.rng.choice(ENDINGS)
            path = folder / name
            kind = self.rng.random()
            if os.path.lexists(path):
                continue
            if kind < 0.6:
                path.write_bytes(self.rng.choice(CONTENTS))
            elif kind < 0.8:
                target = self.rng.choice(["..", ".", "nowhere", name, str(folder), "good.txt"])
                path.symlink_to(target)
            elif depth < 2:
                self.fill(path, depth + 1)

    def choose_out(self):
        """Picks where the run is to write, and whether that is its own place or may become so."""
        rng, base = self.rng, self.world / "runs"
        base.mkdir()
        self.own = base / rng.choice(NAMES)
        kind = self.pick(["new", "deep", "empty", "run"], ["others", "file", "below"])
        self.kind = kind
        self.is_own = kind not in ("others", "file", "below")
        if kind == "deep":
            self.own = self.own / "a" / rng.choice(NAMES)
        elif kind == "empty":
            self.own.mkdir()
        elif kind == "run":
            shutil.copytree(self.finished, self.own)
            if rng.random() < 0.2:
                (self.own / "notes.txt").write_text("mine")
        elif kind == "others":
            self.fill(self.own, depth=1)
            (self.own / "checkpoints/1").mkdir(parents=True)
            (self.own / "checkpoints/1/x").write_text("another tool's")
        elif kind in ("file", "below"):
            self.own.write_text("a file")
            self.own = self.own / "run" if kind == "below" else self.own

    def choose_flags(self):
        rng = self.rng
        self.steps = self.pick([3, 4], [1])
        options = {
            "steps": self.steps,
            "decay-steps": self.pick([3], [7]),
            "save-every": rng.choice([0, 1, 2]),
            "keep": rng.choice([1, 3]),
            "validate-every": rng.choice([0, 2]),
            "seed": self.pick([0], [5, 2**32, 2**63]),
            "remat": self.pick(["full", "full", "full", "none", "sqrt"], ["sqrtt", "names:nope"]),
            "accumulate": self.pick([1], [2, 3]),
        }
        data = self.pick([None, "data/good.txt"], ["data", "data/*.txt", "nowhere", "", "mine"])
        data = None if self.kind == "run" else data  # so that it can be gone on with
        if data is not None:
            options["data"] = self.world / data if data else ""
        self.save_every = options["save-every"]
        given = {flag.partition("=")[0] for flag in map(str, runs.TINY)}
        self.flags = [f"--{name}={value}" for name, value in options.items()]
        own = {flag.partition("=")[0] for flag in self.flags}
        self.flags += [flag for flag in runs.TINY if flag.partition("=")[0] in given - own]
        self.flags += [f"--out={self.own}", f"--compile-cache={self.cache}"]
        there = [["--overwrite"], ["--resume"]]
        self.flags += self.pick(
            there if self.kind == "run" else [[], ["--overwrite"]], [[], *there]
        )
        more = [["--explain"], ["--pack"], ["--sample"], ["--pack", "--end-token=3"]]
        self.flags += self.pick([[]], more)

    def run_here(self) -> tuple[int, str]:
        """Runs in this process; any exception but an exit is a failure."""
        out, code = io.StringIO(), 0
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(out):
            try:
                main(train, self.flags)
            except SystemExit as error:
                code = error.code
        return code, out.getvalue()

    def run_killed(self) -> tuple[int, str]:
        """Runs in a process of its own, which is sent a signal at some event."""
        number = self.rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        event = self.rng.choice([1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 40, 60])
        command = [sys.executable, "-c", KILLED, str(self.own), str(event), str(int(number))]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, *self.flags],
            cwd=self.world,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stderr

    def check(self, killed: bool) -> int:
        """Makes the try and asserts what has to hold; returns the exit code."""
        place = self.own if self.is_own else None
        around, before = state(self.world, place), state(self.world)
        code, err = self.run_killed() if killed else self.run_here()
        about = f"exit code {code}, flags {self.flags}\n{err}"
        assert "Traceback" not in err, about
        stopped = (-signal.SIGKILL, -signal.SIGTERM, 130, 143) if killed else ()
        assert code in (0, 1, 2, *stopped), about
        after = state(self.world, place)
        parents = {
            str(path.relative_to(self.world))
            for path in self.own.parents
            if path.is_relative_to(self.world)
        }
        new = {key: value for key, value in after.items() if key not in around}
        assert {key: after[key] for key in after if key in around} == around, about
        assert all(value is True and key in parents for key, value in new.items()), (new, about)
        if not self.is_own:
            assert code == 2 or (killed and code in stopped), about
        if code == 2:
            lines = [line for line in err.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1 and err.startswith("error: "), about
            assert state(self.world) == before, f"a refused run changed something: {about}"
        if self.is_own:
            self.check_run(code, about)
        return code

    def check_run(self, code: int, about: str):
        """Asserts that a run that says so is done, and that its checkpoints can be read."""
        if code == 0:
            rows = runs.rows(self.own)
            steps = [row["step"] for row in rows if "loss" in row]
            assert max(steps, default=0) == self.steps, about
            assert any(r.get("step") == self.steps and "validation_loss" in r for r in rows), about
            assert not self.save_every or (self.own / f"checkpoints/{self.steps}").is_dir(), about
        saved = Checkpoints(self.own, keep=1)
        steps = [
            int(path.name) for path in (self.own / "checkpoints").glob("*") if path.name.isdecimal()
        ]
        with contextlib.closing(saved):
            for step in steps:
                assert saved.about(step)["config"]["steps"] >= 1, about
                assert saved.parameter(step, ("embed_tokens", "embedding")).shape == (256, 16), (
                    about
                )

    def go_on(self):
        """Asserts that a run which was killed can be gone on with, or begun anew."""
        names = [path.name for path in (self.own / "checkpoints").glob("*")]
        flag = "--resume" if any(map(str.isdecimal, names)) else "--overwrite"
        kept = [flag for flag in self.flags if flag not in ("--overwrite", "--resume")]
        self.flags = [*kept, flag]
        code, err = self.run_here()
        others = ("checkpoint is of another run", "step 3 already")
        assert code == 0 or (code == 2 and any(text in err for text in others)), err


def make(seeds, tmp_path, finished, cache, monkeypatch, killed) -> list[int]:
    codes = []
    for seed in seeds:
        world = tmp_path / str(seed)
        world.mkdir()
        monkeypatch.chdir(world)
        one = Try(seed, world, finished, cache)
        is_killed = killed(seed)
        code = one.check(is_killed)
        if is_killed and one.is_own and code not in (0, 1, 2):
            one.go_on()
        codes.append(code)
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(world)
    return codes


def test_some_random_runs(tmp_path, finished, cache, monkeypatch):
    codes = make(range(IN_GATE), tmp_path, finished, cache, monkeypatch, lambda _: False)
    assert {0, 2} <= {*codes}, "some run, some are refused"


@pytest.mark.heavy
@pytest.mark.parametrize("part", range(_PARTS))
def test_many_random_runs_some_of_them_killed(part, tmp_path, finished, cache, monkeypatch):
    seeds = range(IN_GATE + part, IN_GATE + TRIES, _PARTS)
    killed = lambda seed: seed // _PARTS % _A_KILL_IN == 0
    codes = make(seeds, tmp_path, finished, cache, monkeypatch, killed)
    counts = {code: codes.count(code) for code in sorted({*codes})}
    print(f"{len(codes)} tries, exit codes {counts}")
    assert len(codes) < 50 or counts.get(0, 0) > len(codes) // 10, counts
