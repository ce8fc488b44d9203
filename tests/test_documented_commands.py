"""Every command line of README.md and docs/: each is parsed, and what can be run here is run.

Pages are run from top to bottom in a folder of their own, as a reader would, with a tiny model in
the place of a real one and fewer, shorter steps. `UNRUN` says why a line is parsed alone.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cyclopts import App

from tests.experiments import hf_folders

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_SHELL = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`((?:\.venv/bin/)?python -m [^`]+)`")
_PYTHON = re.compile(r"^(?:\.venv/bin/)?python -m ((?:experiments|benchmarks)\.\w+)\b *(.*)$")

# Lines of a shell that are no command of this project.
OTHERS = {
    r"^(python3 -m venv .*|\.venv/bin/pip install .*|pip install .*)": "it installs packages",
    r"^\.venv/bin/python -m pytest\b": "it is these tests",
    r"^(git|cd|export) ": "it is of the shell",
}
# Lines that are parsed and not run.
UNRUN = {
    r"experiments\.(fit|sweep) .*--target": "compiles whole models for absent chips, for minutes",
    r"experiments\.train .*--processes": "is one of several processes; test_processes starts them",
    r"benchmarks\.": "takes a chip or an hour; the benchmarks' own tests run them small",
    r"experiments\.fit$": "is named, not shown",
    r"PLAN|FILE": "stands for several",
}


def commands_of(text: str) -> list[str]:
    """Returns a page's command lines in their order, each on one line and without comments."""
    found = []
    for block in _SHELL.findall(text):
        joined = block.replace("\\\n", " ")
        lines = [line.split(" #")[0].strip() for line in joined.splitlines()]
        parts = (part for line in lines for part in line.split("&&"))
        found += [" ".join(part.split()) for part in parts if part.strip() and part[0] != "#"]
    found += [" ".join(line.split()) for line in _INLINE.findall(_SHELL.sub("", text))]
    return [line for line in dict.fromkeys(found) if not line.endswith("...")]


def matching(table: dict[str, str], line: str) -> str | None:
    return next((reason for pattern, reason in table.items() if re.search(pattern, line)), None)


ALL = [(page, line) for page in PAGES for line in commands_of(page.read_text())]
OURS = [(page, line) for page, line in ALL if matching(OTHERS, line) is None]
RUN = [page for page in PAGES if any(p == page and not matching(UNRUN, c) for p, c in OURS)]


def test_there_are_commands_and_each_is_known():
    assert len(OURS) > 40
    unknown = [line for _, line in OURS if not _PYTHON.match(line)]
    assert not unknown, "neither a command of this project nor in a table of those that are not"


class Parsed(Exception):
    """A command line was taken."""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("line", dict.fromkeys(line for _, line in OURS))
def test_each_is_taken_by_its_own_parser(line, monkeypatch, tmp_path, capsys):
    module, flags = _PYTHON.match(line).groups()
    if module == "benchmarks.pages":
        pytest.skip("it has no flags, and its tests run it")
    provide(tmp_path)
    parse = App.parse_args

    def parsed(self, tokens=None, **_):
        tokens = sys.argv[1:] if tokens is None else tokens
        raise Parsed(parse(self, tokens, exit_on_error=False, print_error=False))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(App, "parse_args", parsed)
    monkeypatch.setattr(App, "__call__", parsed)
    flags = flags.replace("PLAN", "sqrt").replace("FILE", "x.svg" if "draw" in line else "x.json")
    monkeypatch.setattr(sys, "argv", [module, *shlex.split(flags)])
    try:
        with pytest.raises(Parsed):
            runpy.run_module(module, run_name="__main__")
    except SystemExit:
        pytest.fail(capsys.readouterr().err)


def provide(folder: Path):
    """Puts what the pages speak of into a folder: configurations, data, weights to start from."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "docs/measured").mkdir(parents=True)
    text = "def import self: return the of and in for\n" * 300
    (folder / "notes").mkdir()
    (folder / "notes/a.txt").write_text(text)
    line = '{"text": "def import self: return the of and in for"}\n'
    (folder / "stories.jsonl").write_text(line * 100)
    hf_folders.write(folder / "Qwen3-0.6B")
    hf_folders.write_tokenizer(folder / "Qwen3-0.6B")


# What a run takes here instead of what the page says.
SMALLER = {"--seq-len": "16", "--save-every": "1", "--validation-batches": "1"}
FEWER_STEPS = 50
ADDED = {
    "train": ["--validation-batches=1"],
    "sweep": ["--num-blocks=2", "--seq-len=16", "--run-steps=2"],
    "claims": ["-o=claims.md"],
}


def smaller(line: str) -> list[str]:
    """Returns a page's command line with fewer and shorter steps."""
    module, rest = _PYTHON.match(line).groups()
    tokens, name = shlex.split(rest), module.partition(".")[2]
    for place, token in enumerate(tokens[:-1]):
        if token in SMALLER:
            tokens[place + 1] = SMALLER[token]
        elif token == "--steps":
            tokens[place + 1] = str(int(tokens[place + 1]) // FEWER_STEPS)
    if name == "train" and "--seq-len" not in tokens:
        tokens += ["--seq-len", "16"]
    if name == "train" and "--steps" not in tokens:
        tokens += ["--steps", "2"]
    return [sys.executable, "-m", module, *tokens, *ADDED.get(name, [])]


@pytest.mark.heavy
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_pages_commands_run_from_top_to_bottom(page, tmp_path):
    provide(tmp_path)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAXCKPT_CACHE": str(tmp_path / "cache"),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    before = subprocess.run(["git", "status", "-s"], cwd=ROOT, capture_output=True).stdout
    for line in (line for found, line in OURS if found == page and not matching(UNRUN, line)):
        command = smaller(line)
        if "figure" in line or ".svg" in line:
            pytest.importorskip("matplotlib")
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{line}\n{shlex.join(command)}\n{done.stderr}"
    after = subprocess.run(["git", "status", "-s"], cwd=ROOT, capture_output=True).stdout
    assert before == after, "a command that names no place outside of its folder wrote there"


def test_a_wrong_command_on_a_page_is_seen():
    text = "```bash\npython -m experiments.draw \\\n  sqrt --blocks 3 && nonsense --x\n```\n"
    text += "see `python -m benchmarks.rivals`\n"
    lines = commands_of(text)
    assert lines[0] == "python -m experiments.draw sqrt --blocks 3"
    assert lines[1:] == ["nonsense --x", "python -m benchmarks.rivals"]
    assert not _PYTHON.match(lines[1]) and matching(OTHERS, lines[1]) is None
