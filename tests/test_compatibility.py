"""A JAX and a Flax that do not work together are refused at import, in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxckpt import compatibility

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "jax, flax", [("0.10.2", "0.12.8"), ("0.11.0", "0.12.8"), ("0.12.0.1", "0.12.12")]
)
def test_pairs_that_work(jax, flax):
    compatibility.check(jax=jax, flax=flax)


@pytest.mark.parametrize(
    "jax, flax", [("0.11.1", "0.12.8"), ("0.12.0.1", "0.12.9"), ("0.12.0.dev20261101", "0.12.8")]
)
def test_pairs_that_do_not(jax, flax):
    with pytest.raises(ImportError, match=f"flax {flax} does not work with jax {jax}; install "):
        compatibility.check(jax=jax, flax=flax)


@pytest.fixture
def environment(tmp_path):
    """An environment in which a bad pair's metadata is found first."""
    for name, version in (("jax", "0.12.0"), ("flax", "0.12.8")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}")
    return {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


def test_import_is_refused(environment):
    done = subprocess.run(
        [sys.executable, "-c", "import jaxckpt"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: flax 0.12.8 does not work with jax 0.12.0; install 'flax>=0.12.10'"
    )


def test_the_command_line_prints_one_line(environment):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", "--remat=sqrt"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: flax 0.12.8 does not work with jax 0.12.0")
    assert done.stderr.count("\n") == 1


def test_the_cure_is_one_that_works_here(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert compatibility.install("tpu") == "pip install -e '.[tpu]'"
    monkeypatch.chdir(tmp_path)
    assert compatibility.install("tpu") == f"pip install -e '{ROOT}[tpu]'"
    monkeypatch.setattr(compatibility, "__file__", str(tmp_path / "jaxckpt/compatibility.py"))
    assert compatibility.install("tpu") == "pip install 'jaxckpt[tpu]'"


@pytest.mark.parametrize("module", ["train", "draw", "report", "claims"])
def test_a_command_without_its_extra_is_one_line(module):
    hide = (
        "import importlib.util, runpy, sys\nfind = importlib.util.find_spec\n"
        "hidden = lambda name, *rest: None if name == 'cyclopts' else find(name, *rest)\n"
        "importlib.util.find_spec = hidden\nsys.modules['cyclopts'] = None\n"
        f"runpy.run_module('experiments.{module}', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", hide], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: experiments need: pip install -e '.[experiments]'\n"
