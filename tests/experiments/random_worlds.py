"""One random command line in a random world, and what has to hold when it has ended.

    one = Drawn(seed=3, world=folder, given=given)     # folder is empty, and the working directory
    code = one.check(killed=False)

Nothing outside of what the command was told to write has changed, there is no traceback, a refused
command has changed nothing, and what a command says that it has done is there. A kill comes at an
event, the nth file that the command touches where it writes, and not after some time.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from experiments.cli import main
from experiments.sweeping import running
from experiments.training.checkpoints import Checkpoints
from experiments.weights.shards import Shards
from tests.experiments import runs

ROOT = Path(__file__).parents[2]
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
# What a write that is killed leaves beside its file, and an export beside its folder.
_LEFT = re.compile(r"\.part-[0-9a-f]{32}|\..*\.[a-z0-9_]{8}")
_KILLED = """
import os, sys
folder, left, number, command = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def count(event, args):
    global left
    if event.startswith(("open", "os.", "shutil.")) and args and str(args[0]).startswith(folder):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

sys.addaudithook(count)
from tests.experiments import random_worlds

random_worlds.call(command, sys.argv[5:], random_worlds.Path(os.environ["RUNS_CACHE"]))
"""


@dataclasses.dataclass(frozen=True)
class Given:
    """What every try finds copies of, and where compiled programs are kept."""

    run: Path
    sweep: Path
    cache: Path


def call(command: str, flags: list[str], cache: Path):
    """Runs a command in this process; the runs of a sweep as well, which start many otherwise."""

    def run_module(module: str, flags: list[str], _):
        kept = [flag for flag in flags if not flag.startswith("--compile-cache")]
        said, name = io.StringIO(), module.rpartition(".")[2]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            try:
                own = [f"--compile-cache={cache}"] if name == "train" else []
                call(name, [*kept, *own], cache)
            except SystemExit as error:
                if error.code:
                    raise running.RowError(running._reason(error.code, said.getvalue())) from None

    before, running._run_module = running._run_module, run_module
    try:
        main(getattr(importlib.import_module(f"experiments.{command}"), command), flags)
    finally:
        running._run_module = before


def state(folder: Path, without: frozenset[Path] = frozenset()) -> dict[str, object]:
    """Returns what is in a folder: files by their bytes, links by where they lead."""
    found = {}
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(here, name) not in without]
        for name in (*folders, *files):
            path = Path(here, name)
            if path in without:
                continue
            key = str(path.relative_to(folder))
            found[key] = (
                os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_bytes()
            )
    return found


class Try:
    """One world, one command line in it, and what has to hold afterwards.

    Attributes:
      command: Its name.
      own: The folder or the files that it was told to write.
      is_own: Whether it may write there.
      about: All that is known of the try, for what fails.
    """

    command: str
    own: list[Path]
    is_own = True
    about = ""

    def __init__(self, seed: int, world: Path, given: Given):
        self.rng, self.world, self.given = random.Random(seed), world, given
        self.fill(world / "mine", depth=0)
        self.fill(world / "data", depth=0)
        (world / "data/good.txt").write_text(TEXT)
        self.base = world / "out"
        self.base.mkdir()
        self.oddness = self.rng.choice([0.0, 0.05, 0.05, 0.3])
        self.flags: list[str] = []
        self.choose()

    def choose(self):
        """Picks what the command writes, and its flags."""
        raise NotImplementedError

    def done(self):
        """Asserts that a command which says so has done what it was asked for."""
        raise NotImplementedError

    def whole(self):
        """Asserts that whatever is there can be read."""

    def go_on(self):
        """Asserts that the same command, after it was killed, does what it would have done."""
        code, err = self.run_here()
        assert code in (0, 1, 2) and "Traceback" not in err, err
        if code == 0:
            self.done()

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

    def choose_folder(self, earlier: Path | None):
        """Picks a folder to write to, and whether that is the command's own or may become so."""
        rng, own = self.rng, self.base / self.rng.choice(NAMES)
        usual = ["new", "deep", "empty", "earlier"] if earlier else ["new", "empty"]
        kind = self.pick(usual, ["others", "file", "below"])
        self.kind = kind
        self.is_own = kind not in ("others", "file", "below")
        if kind == "deep":
            own = own / "a" / rng.choice(NAMES)
        elif kind == "empty":
            own.mkdir()
        elif kind == "earlier":
            shutil.copytree(earlier, own)
            if rng.random() < 0.2:
                (own / "notes.txt").write_text("mine")
        elif kind == "others":
            self.fill(own, depth=1)
            (own / "checkpoints/1").mkdir(parents=True)
            (own / "checkpoints/1/x").write_text("another tool's")
        elif kind in ("file", "below"):
            own.write_text("a file")
            own = own / "run" if kind == "below" else own
        self.own = [own]

    def choose_file(self, endings: list[str]) -> Path:
        """Returns a file to write; sets `is_own` to False where it must not be written."""
        path = self.base / (self.rng.choice(NAMES) + self.pick(endings, ["", ".htm", ".pdf"]))
        kind = self.pick(["new"], ["others", "folder", "below", "linked"])
        if os.path.lexists(path):
            kind = "there"
        elif kind == "others":
            path.write_text("a file of somebody else")
        elif kind == "folder":
            path.mkdir()
        elif kind == "below":
            path = path / "below"
        elif kind == "linked":
            path.symlink_to(self.world / "data/good.txt")
        self.is_own = self.is_own and kind in ("new", "there")
        return path

    def tiny(self, options: dict[str, object]):
        """Adds the flags of a tiny model, with some options of its own."""
        tiny = runs.TINY if self.command == "train" else runs.SHAPE
        given = {str(flag).partition("=")[0] for flag in tiny}
        own = [f"--{name}={value}" for name, value in options.items()]
        named = {flag.partition("=")[0] for flag in own}
        rest = [flag for flag in tiny if flag.partition("=")[0] in given - named]
        self.flags += [*own, *rest]

    def data(self) -> dict[str, object]:
        """Returns the option that says which text, if any."""
        data = self.pick([None, "data/good.txt"], ["data", "data/*.txt", "nowhere", "", "mine"])
        return {} if data is None else {"data": self.world / data if data else ""}

    def run_here(self) -> tuple[int, str]:
        """Runs in this process; any exception but an exit is a failure."""
        err, code = io.StringIO(), 0
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            try:
                call(self.command, self.flags, self.given.cache)
            except SystemExit as error:
                code = error.code or 0
        return code, err.getvalue()

    def run_killed(self) -> tuple[int, str]:
        """Runs in a process of its own, which is sent a signal at some event."""
        number = self.rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        event = self.rng.choice([1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 40, 60])
        done = subprocess.run(
            [
                *(sys.executable, "-c", _KILLED, self.base, str(event), str(int(number))),
                *(self.command, *self.flags),
            ],
            cwd=self.world,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": str(ROOT),
                "RUNS_CACHE": str(self.given.cache),
            },
            capture_output=True,
            text=True,
            timeout=runs.HANG_SECONDS,
        )
        return done.returncode, done.stderr

    def check(self, killed: bool) -> int:
        """Makes the try and asserts what has to hold; returns the exit code."""
        own = frozenset(self.own if self.is_own else ())
        around, before = state(self.world, own), state(self.world)
        code, err = self.run_killed() if killed else self.run_here()
        about = f"{self.command}, exit code {code}, flags {self.flags}\n{err}"
        self.about = about
        stopped = (-signal.SIGKILL, -signal.SIGTERM, 130, 143) if killed else ()
        was_stopped = code in stopped
        assert was_stopped or "Traceback" not in err, about
        assert code in (0, 1, 2) or was_stopped, about
        after = state(self.world, own)
        parents = {
            str(path.relative_to(self.world))
            for one in self.own
            for path in one.parents
            if path.is_relative_to(self.world)
        }
        new = {key: value for key, value in after.items() if key not in around}
        assert {key: after[key] for key in after if key in around} == around, about
        if code == -signal.SIGKILL:
            new = {key: value for key, value in new.items() if not self.is_left(key)}
        assert all(value is True and key in parents for key, value in new.items()), (new, about)
        if not self.is_own:
            assert code == 2 or was_stopped, about
        if code == 2:
            lines = [line for line in err.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1, about
            self.refused(state(self.world) == before)
        elif code == 0:
            self.done()
        if self.is_own:
            self.whole()
        return code

    def refused(self, nothing_changed: bool):
        """Asserts what holds after a refusal."""
        assert nothing_changed, f"a refused command changed something: {self.about}"

    def is_left(self, key: str) -> bool:
        """Whether something is what a killed command leaves beside what it writes."""
        top = Path(key).relative_to(self.base.relative_to(self.world)).parts
        return bool(top) and _LEFT.fullmatch(top[0]) is not None


class Trained(Try):
    """A run, new, on top of an earlier one, or going on with it."""

    command = "train"

    def choose(self):
        rng = self.rng
        self.choose_folder(self.given.run)
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
        if self.kind != "earlier":  # so that it can be gone on with
            options |= self.data()
        self.save_every = options["save-every"]
        self.tiny(options)
        self.flags += [f"--out={self.own[0]}", f"--compile-cache={self.given.cache}"]
        there = [["--overwrite"], ["--resume"]]
        usual = there if self.kind == "earlier" else [[], ["--overwrite"]]
        self.flags += self.pick(usual, [[], *there])
        more = [["--explain"], ["--pack"], ["--sample"], ["--pack", "--end-token=3"]]
        self.flags += self.pick([[]], more)

    def done(self):
        (own,) = self.own
        rows = runs.rows(own)
        steps = [row["step"] for row in rows if "loss" in row]
        assert max(steps, default=0) == self.steps, self.about
        last = [row for row in rows if row.get("step") == self.steps]
        assert any("validation_loss" in row for row in last), self.about
        assert not self.save_every or (own / f"checkpoints/{self.steps}").is_dir(), self.about

    def whole(self):
        (own,) = self.own
        names = [path.name for path in (own / "checkpoints").glob("*")]
        with contextlib.closing(Checkpoints(own, keep=1)) as saved:
            for step in (int(name) for name in names if name.isdecimal()):
                assert saved.about(step)["config"]["steps"] >= 1, self.about
                embedding = saved.parameter(step, ("embed_tokens", "embedding"))
                assert embedding.shape == (256, 16), self.about

    def go_on(self):
        """Goes on with a run that was killed, or begins it anew."""
        names = [path.name for path in (self.own[0] / "checkpoints").glob("*")]
        flag = "--resume" if any(map(str.isdecimal, names)) else "--overwrite"
        kept = [flag for flag in self.flags if flag not in ("--overwrite", "--resume")]
        self.flags = [*kept, flag]
        code, err = self.run_here()
        others = ("checkpoint is of another run", "step 3 already")
        assert code == 0 or (code == 2 and any(text in err for text in others)), err


class Swept(Try):
    """A sweep of one plan or two, new or going on in the folder of another."""

    command = "sweep"

    def choose(self):
        self.choose_folder(self.given.sweep)
        plans = [self.pick(["full", "none"], ["sqrtt", "names:nope", "auto"])]
        plans += self.rng.choice([[], [], ["sqrt"]])
        self.plans = plans
        self.flags += [*(f"--plan={plan}" for plan in plans), f"--folder={self.own[0]}"]
        self.flags += [f"--run-steps={self.pick([2], [0, 1])}"]
        self.tiny({"depth": self.pick([3], [0, 2]), **self.data()})

    def rows(self) -> dict[str, dict]:
        """Returns the last row of each plan."""
        path = self.own[0] / "rows.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {row["asked"]: row for row in map(json.loads, lines)}

    def done(self):
        rows = self.rows()
        for plan in self.plans:
            assert "error" not in rows[plan] and rows[plan]["peak_bytes"] > 0, self.about
            record = runs.rows(self.own[0] / rows[plan]["run"])
            losses = [row["loss"] for row in record if "loss" in row]
            assert losses == rows[plan]["losses"], self.about


class Fitted(Try):
    """A table for the chip that is here, as JSON or not."""

    command = "fit"

    def choose(self):
        self.plan = self.pick(["full", "none", "auto"], ["sqrtt", "names:nope", "3xfull/none"])
        self.own = [self.choose_file([".json"])] if self.rng.random() < 0.8 else []
        options: dict[str, object] = {"plan": self.plan}
        if self.plan == "auto":
            options["budget"] = self.pick(["1GiB"], ["1KiB", "1GBB"])
        if self.own:
            options["json"] = self.own[0]
        self.tiny(options)

    def done(self):
        for path in self.own:
            (row,) = json.loads(path.read_text())["rows"]
            assert row.get("error") is None and row["peak_bytes"] > 0, self.about

    def refused(self, nothing_changed: bool):
        """A plan that does not fit is an answer, and is written as one."""
        if self.own and self.is_own and self.own[0].exists():
            (row,) = json.loads(self.own[0].read_text())["rows"]
            assert row["error"], self.about
        else:
            super().refused(nothing_changed)


def _html(path: Path):
    text = path.read_text()
    assert text.rstrip().endswith("</html>") or "Written by a command of jaxckpt" in text


def _figure(path: Path):
    content = path.read_bytes()
    if path.suffix == ".svg":
        ElementTree.fromstring(content)
    else:
        assert content.startswith(b"\x89PNG") and content.rstrip(b"\n")[-8:-4] == b"IEND"


class Reported(Try):
    """A page, and perhaps a figure, of runs and sweeps: whole ones, torn ones and none."""

    command = "report"

    def choose(self):
        kinds = ["run", "sweep", "torn"]
        for number in range(self.rng.randrange(1, 3)):
            kind = self.pick(kinds, ["mine", "nowhere", "data/good.txt"])
            path = self.world / kind
            if kind in kinds:
                path = self.world / f"{number} {self.rng.choice(NAMES)}"
                shutil.copytree(self.given.sweep if kind == "sweep" else self.given.run, path)
            if kind == "torn":
                record = path / "metrics.jsonl"
                content = record.read_bytes()
                record.write_bytes(content[: self.rng.randrange(len(content))])
            self.flags.append(str(path))
        page = self.choose_file([".html"])
        self.own, self.checks = [page], {page: _html}
        self.flags.append(f"--out={page}")
        if self.rng.random() < 0.4:
            figure = self.choose_file([".svg", ".png"])
            self.own.append(figure)
            self.checks[figure] = _figure
            self.flags.append(f"--figure={figure}")

    def done(self):
        assert all(path.is_file() for path in self.own), self.about

    def whole(self):
        for path, check in self.checks.items():
            if path.is_file() and path.stat().st_size:
                check(path)


class Exported(Try):
    """The weights of a run."""

    command = "export"

    def choose(self):
        self.choose_folder(None)
        run = self.pick(["run"], ["mine", "nowhere", "sweep"])
        if run in ("run", "sweep"):
            shutil.copytree(getattr(self.given, run), self.world / run)
        self.flags = [str(self.world / run), f"--out={self.own[0]}"]
        self.flags += self.pick([[], ["--step=1"]], [["--step=9"], ["--shard-gb=0"]])
        self.flags += self.pick([[], ["--dtype=f32", "--shard-gb=1e-5"]], [["--dtype=f16"]])

    def done(self):
        shards = Shards(self.own[0])
        assert shards.tensor("model.embed_tokens.weight").shape == (256, 16), self.about

    def whole(self):
        if (self.own[0]).is_dir() and any(self.own[0].iterdir()):
            self.done()


class Drawn(Try):
    """A plan's picture."""

    command = "draw"

    def choose(self):
        plan = self.pick(["full", "binomial:3", "4xsqrt/full+dots", "log"], ["sqrtt", "auto", ""])
        self.own = [self.choose_file([".txt", ".svg", ".png"])] if self.rng.random() < 0.9 else []
        self.flags = [plan, f"--blocks={self.pick([12, 5], [0, -1, 2])}"]
        self.flags += [f"--out={path}" for path in self.own]

    def done(self):
        for path in self.own:
            _figure(path) if path.suffix != ".txt" else path.read_text().index("jaxckpt")

    def whole(self):
        if self.own and self.own[0].is_file():
            self.done()


# In turn; half of the tries are runs, whose command does the most.
TRIES: list[Callable[[int, Path, Given], Try]] = [
    *(Trained, Swept, Trained, Fitted, Trained),
    *(Reported, Trained, Exported, Trained, Drawn),
]
