"""Reports on disk: what they are kept under, that they are found again, and files that are torn."""

import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.absent import exported, jobs, launch
from jaxckpt.absent.jobs import Entry, measure_entry
from jaxckpt.absent.launch import WorkerError
from jaxckpt.compiled import cache
from jaxckpt.memory import measure
from tests.compiled.test_report import REPORT


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def started(monkeypatch):
    """Worker processes that would have been started, in place of starting any."""
    found = []
    monkeypatch.setattr(launch, "check_available", lambda target: None)
    monkeypatch.setattr(launch, "run", lambda job, *rest: found.append(job) or REPORT)
    return found


def kept(folder):
    return sorted(folder.rglob("*.json"))


def test_an_entry_is_compiled_once_for_what_it_depends_on(started, folder, monkeypatch):
    entry = Entry(function="tests.memory.steps:gradients", arguments={"plan": "full"})
    other = Entry(function="tests.memory.steps:gradients", arguments={"plan": "sqrt"})
    assert measure_entry(entry, "v5e-1") == measure_entry(entry, "v5e-1") == REPORT
    assert len(started) == 1
    measure_entry(other, "v5e-1")
    measure_entry(entry, "v5e-4")
    assert len(started) == 3
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    measure_entry(entry, "v5e-1")
    assert len(started) == 4
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(cache, "versions", lambda: {"jax": "99"})
    measure_entry(entry, "v5e-1")
    assert len(started) == 5 and len(kept(folder)) == 5
    monkeypatch.setattr(cache, "digest_of_sources", lambda packages: "edited")
    measure_entry(entry, "v5e-1")
    assert len(started) == 6


def test_a_program_is_compiled_once_for_what_it_is(started):
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    make = lambda: lambda x, y: (x @ y, x.sum())
    measure = lambda fn, **options: jaxckpt.measure(fn, x, x, target="v5e-1", **options)
    assert measure(make()).flops == 2 * 64**3  # counted here, whatever the report said
    measure(make())  # another function, the same program
    assert len(started) == 1
    measure(make(), donate_argnums=0)
    measure(lambda x, y: (x @ y, y.sum()))
    jaxckpt.measure(make(), x, x, target="h100")
    assert len(started) == 4
    assert ".py" not in exported.pack(jax.jit(make()), (x, x), "tpu").text
    assert started[1]["donated"] == [True, False] and started[0]["donated"] == [False, False]


def test_a_torn_file_is_measured_again(started, folder):
    entry = Entry(function="tests.memory.steps:small")
    measure_entry(entry, "v5e-1")
    (path,) = kept(folder)
    whole = path.read_text()
    for torn in (whole[: len(whole) // 2], "", "[]", '{"peak_bytes": 1}', "\x00"):
        path.write_text(torn)
        assert measure_entry(entry, "v5e-1") == REPORT
        assert path.read_text() == whole
    assert len(started) == 6


def test_a_failure_is_not_kept(started, folder, monkeypatch):
    def fail(*job):
        raise WorkerError("no", kind="died", detail="")

    monkeypatch.setattr(launch, "run", fail)
    with pytest.raises(WorkerError):
        measure_entry(Entry(function="tests.memory.steps:small"), "v5e-1")
    assert kept(folder) == []


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(started, folder):
    folder.write_text("a file, not a folder")
    for _ in range(2):
        assert measure_entry(Entry(function="tests.memory.steps:small"), "v5e-1") == REPORT
    assert len(started) == 2


def test_many_writers_leave_one_whole_file(folder):
    threads = [threading.Thread(target=cache.store, args=("name", REPORT)) for _ in range(16)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert cache.load("name") in (None, REPORT)
    assert cache.load("name") == REPORT
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["name.json"]


def test_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "kept"
    monkeypatch.delenv("JAXCKPT_CACHE")
    assert cache.folder() == tmp_path / "jaxckpt"


def test_sources_are_read_without_importing_them(tmp_path, monkeypatch):
    package = tmp_path / "made_up"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    first = cache.digest_of_sources(["made_up"])
    assert first == cache.digest_of_sources(["made_up"])
    (package / "more.py").write_text("x = 1\n")
    assert cache.digest_of_sources(["made_up"]) != first
    with pytest.raises(ValueError, match=r"entry 'not_there.a:b': no module named 'not_there'"):
        measure_entry(Entry(function="not_there.a:b"), "v5e-1")


def test_sources_that_a_package_imports_count_too(tmp_path, monkeypatch):
    """Whole packages, whatever they are, but for those that are installed with a version."""
    for package in ("entry_of", "helper_of", "stranger_of"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "entry_of" / "step.py").write_text("def f():\n  import os, helper_of.deep as h\n")
    (tmp_path / "helper_of" / "deep.py").write_text("from single_of import x\nimport jax\n")
    (tmp_path / "single_of.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    digest = lambda: cache.digest_of_sources({"entry_of"})
    seen = [digest()]
    for name in ("entry_of/other.py", "helper_of/unread.py", "single_of.py", "helper_of/deep.py"):
        with (tmp_path / name).open("a") as file:
            file.write("# edited\n")
        assert digest() not in seen
        seen.append(digest())
    (tmp_path / "stranger_of" / "__init__.py").write_text("# edited\n")
    assert digest() == seen[-1]


def test_a_report_depends_on_what_it_is_made_with_and_not_on_the_planner(monkeypatch):
    roots = []
    root_of = cache._roots
    monkeypatch.setattr(cache, "_roots", lambda name: roots.append(name) or root_of(name))
    cache.digest_of_sources({"jaxckpt.memory"})
    assert {"jaxckpt.memory", "jaxckpt.plans", "jaxckpt.transforms"} <= set(roots)
    assert not {"jaxckpt", "jaxckpt.planner"} & set(roots)


@pytest.mark.parametrize("name", ["XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "TF_X"])
def test_settings_of_compilers_count(monkeypatch, name):
    before = cache.key(a=1)
    monkeypatch.setenv(name, "another")
    assert cache.key(a=1) != before
    monkeypatch.delenv(name)
    for other in ("JAXCKPT_CACHE", "PWD", "PYTEST_CURRENT_TEST"):
        monkeypatch.setenv(other, "another")
    assert cache.key(a=1) == before


def test_everything_that_is_installed_counts():
    found = cache.versions()
    assert {"python", "jax", "jaxlib", "scipy", "pytest"} <= found.keys()
    assert found["jax"] == jax.__version__


def test_what_this_process_compiles_depends_on_its_devices_and_settings():
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    lowered = lambda **options: jax.jit(lambda x: x @ x, **options).lower(x)
    key = lambda **options: measure.program_key(lowered(**options))
    assert key() == key() and cache.here()["devices"] == [d.device_kind for d in jax.devices()]
    assert len({key(), key(donate_argnums=0), measure.program_key(lowered(), more=1)}) == 3
    before = key()
    level = "jax_exec_time_optimization_effort"  # in no program's text
    with jax.default_matmul_precision("highest"):
        assert key() != before
    old = getattr(jax.config, level)
    try:
        jax.config.update(level, -1.0)
        assert key() != before
    finally:
        jax.config.update(level, old)
    assert key() == before


def test_a_table_made_before_is_read_at_once_and_without_jax(started):
    plans = [{"plan": f"uniform:{n}"} for n in range(1, 41)]
    asked = [(Entry(function="tests.memory.steps:gradients", arguments=p), "v5e-1") for p in plans]
    jobs.measure_many(asked)
    assert len(started) == len(asked)
    code = (
        "import sys, time\n"
        "from jaxckpt.absent.jobs import Entry, measure_many\n"
        "plans = [{'plan': f'uniform:{n}'} for n in range(1, 41)]\n"
        "name = 'tests.memory.steps:gradients'\n"
        "jobs = [(Entry(function=name, arguments=p), 'v5e-1') for p in plans]\n"
        "print({one.peak_bytes for one in measure_many(jobs)}, 'jax' in sys.modules)\n"
    )
    environment = launch.environment(jobs.parse_target("v5e-1"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout == f"{{{REPORT.peak_bytes}}} False\n", done.stderr
