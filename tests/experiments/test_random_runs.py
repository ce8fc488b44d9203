"""Random folders, flags and kills: whatever comes of a command, nothing of anybody else's changes.

`random_worlds.py` has what holds after each try. `JAXCKPT_TRIES` is how many tries the heavy test
makes.
"""

import os
import shutil

import pytest

from tests.experiments import random_worlds, runs

pytestmark = pytest.mark.slow

TRIES = int(os.environ.get("JAXCKPT_TRIES", "500"))
IN_GATE = 10
_A_KILL_IN = 10
_PARTS = 4  # for workers side by side


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A finished run and a sweep, which tries find copies of."""
    cache, folder = tmp_path_factory.mktemp("compiled"), tmp_path_factory.mktemp("given")
    runs.train("--steps=3", "--save-every=1", f"--out={folder / 'run'}", cache=cache)
    flags = [*runs.SHAPE, "--plan=full", "--run-steps=2", f"--folder={folder / 'sweep'}"]
    random_worlds.call("sweep", flags, cache)
    return random_worlds.Given(folder / "run", folder / "sweep", cache)


def make(seeds, tmp_path, given, monkeypatch, killed) -> list[tuple[str, int]]:
    """Makes tries, and returns each one's command and exit code."""
    codes = []
    for seed in seeds:
        world = tmp_path / str(seed)
        world.mkdir()
        monkeypatch.chdir(world)
        # Of every ten in a row, and of every ten that are killed, each command has its share.
        one = random_worlds.TRIES[(seed + seed // 40) % 10](seed, world, given)
        is_killed = killed(seed)
        code = one.check(is_killed)
        if is_killed and one.is_own and code not in (0, 1, 2):
            one.go_on()
        codes.append((one.command, code))
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(world)
    return codes


@pytest.mark.heavy
def test_some_random_commands(tmp_path, given, monkeypatch):
    made = make(range(IN_GATE), tmp_path, given, monkeypatch, lambda _: False)
    assert len({command for command, _ in made}) == 6
    assert {0, 2} <= {code for _, code in made}, "some run, some are refused"


@pytest.mark.heavy
@pytest.mark.parametrize("part", range(_PARTS))
def test_many_random_commands_some_of_them_killed(part, tmp_path, given, monkeypatch):
    seeds = range(IN_GATE + part, IN_GATE + TRIES, _PARTS)
    killed = lambda seed: seed // _PARTS % _A_KILL_IN == 0
    made = make(seeds, tmp_path, given, monkeypatch, killed)
    counts = {one: made.count(one) for one in sorted({*made})}
    print(f"{len(made)} tries, commands and exit codes {counts}")
    for command in {command for command, _ in made}:
        assert len(made) < 50 or counts.get((command, 0)), counts
