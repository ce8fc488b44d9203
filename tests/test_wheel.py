"""The wheel that users install: complete, typed, and as right as the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, cwd: Path, site: Path | None = None) -> str:
    """Runs a command outside the checkout; returns what it printed.

    Raises:
      AssertionError: It failed.
    """
    env = {**os.environ, "JAX_PLATFORMS": "cpu"} | ({"PYTHONPATH": str(site)} if site else {})
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with nothing but the built wheel installed in it."""
    source, wheels, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "jaxckpt", source / "jaxckpt", ignore=shutil.ignore_patterns("__pycache__")
    )
    # The test extra brings the build backend, so that building needs no network.
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source, cwd=wheels)
    (wheel,) = wheels.glob("jaxckpt-*.whl")
    run("-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=wheels)
    return site


def test_the_wheel_holds_every_module_and_nothing_else(site):
    packaged = {path.relative_to(site) for path in (site / "jaxckpt").rglob("*.py")}
    assert packaged == {path.relative_to(ROOT) for path in (ROOT / "jaxckpt").rglob("*.py")}
    assert (site / "jaxckpt" / "py.typed").exists()
    assert sorted(path.name for path in site.iterdir() if "dist-info" not in path.name) == [
        "jaxckpt"
    ]


@pytest.mark.slow
def test_the_wheel_trains(site, tmp_path):
    code = (
        "import jax, jax.numpy as jnp, jaxckpt\n"
        "print(jaxckpt.__file__)\n"
        "from jaxckpt.models import Transformer, TransformerConfig\n"
        "tokens = jnp.arange(16).reshape(2, 8)\n"
        "model = lambda plan: Transformer(TransformerConfig(num_blocks=3), remat=plan)\n"
        "variables = model('none').init(jax.random.key(0), tokens)\n"
        "for plan in ('none', 'sqrt'):\n"
        "    grad = jax.grad(lambda v: model(plan).apply(v, tokens).std())(variables)\n"
        "    print(round(float(jnp.abs(grad['params']['norm']['scale']).sum()), 4))\n"
    )
    where, none, sqrt = run("-c", code, cwd=tmp_path, site=site).split()
    assert Path(where).is_relative_to(site)
    assert none == sqrt != "0.0"


# What a checkout has beside what is tracked.
UNTRACKED = (
    *(".git", ".venv*", "*.egg-info", "__pycache__", "build", "dist", "runs", "sweeps", "_build"),
    *(".pytest_cache", ".hypothesis", ".ruff_cache", ".cache"),
)


def test_the_source_distribution_holds_the_whole_checkout(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*UNTRACKED))
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    run("-c", "from setuptools import build_meta; build_meta.build_sdist('../dist')", cwd=source)
    (archive,) = (tmp_path / "dist").glob("jaxckpt-*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    for top in ("tests", "docs", "configs", "experiments", "benchmarks", "notebooks", "jaxckpt"):
        assert any(name.startswith(f"{top}/") for name in files), top
    tops = {name for name in files if "/" not in name}
    own = {".gitignore", ".pre-commit-config.yaml"}  # of a checkout
    assert files - packed == own & tops


def test_citation_and_changelog_name_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    released = re.search(rf"^## {version} \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert f"\nversion: {version}\ndate-released: {released[1]}\n" in citation


@pytest.mark.heavy
def test_the_fast_tests_pass_on_the_wheel(site, tmp_path):
    shutil.copytree(ROOT / "tests" / "plans", tmp_path / "tests" / "plans")
    (tmp_path / "conftest.py").write_text(
        f"import jaxckpt\n\nassert jaxckpt.__file__.startswith({str(site)!r})\n"
    )
    flags = ("--import-mode=importlib", "-q", "-p", "no:cacheprovider")
    output = run("-m", "pytest", *flags, "tests", cwd=tmp_path, site=site)
    assert " passed" in output and "failed" not in output
