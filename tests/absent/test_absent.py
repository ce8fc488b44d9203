"""Compiling for chips that are not there, in processes of their own.

Tests that need libtpu or JAX's CUDA plugin say so when they are skipped.
"""

import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import jaxckpt
from jaxckpt.absent import exported, launch
from jaxckpt.absent.exported import PlacementError, TravelError
from jaxckpt.absent.jobs import Entry, JobFailure, measure_entry, measure_many
from jaxckpt.absent.launch import Unavailable, WorkerError
from jaxckpt.memory.workspace import workspace_bytes
from jaxckpt.plans.errors import UserError
from jaxckpt.targets.target import TargetError, parse_target
from tests.memory import steps


def needs(target):
    try:
        launch.check_available(parse_target(target))
    except Unavailable as error:
        return pytest.mark.skip(reason=str(error))
    return pytest.mark.xdist_group("absent")  # one compiler at a time is enough for a machine


needs_tpu, needs_cuda = needs("v5e-1"), needs("h100")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))


def entry(name, **arguments):
    return Entry(function=f"tests.memory.steps:{name}", arguments=arguments)


def small(**arguments):
    step, args, donated = steps.small(**arguments)
    return {"fn": step, "args": args, "donate_argnums": donated}


@pytest.mark.slow
@needs_tpu
def test_plans_in_their_order_two_at_once():
    plans = ("none", "full", "sqrt", "log")
    seen = []
    reports = measure_many(
        [(entry("gradients", plan=plan), "v5e-1") for plan in plans],
        progress=lambda place, report: seen.append((place, report)),
    )
    peaks = [report.peak_bytes for report in reports]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4
    assert sorted(place for place, _ in seen) == [0, 1, 2, 3]
    assert all(reports[place] is report for place, report in seen)
    carry = 4 * steps.CARRY[0] * steps.CARRY[1]
    none, full = reports[:2]
    # `full` keeps each block's input, `none` at least one residual of each block besides.
    assert steps.NUM_BLOCKS * carry <= full.temp_bytes < (steps.NUM_BLOCKS + 4) * carry
    assert none.temp_bytes > 1.9 * full.temp_bytes
    assert full.buffers[0].size_bytes == steps.NUM_BLOCKS * carry
    assert full.source == "XLA tpu, main memory's buffer assignment" and full.fits
    assert full.usable_bytes == parse_target("v5e-1").usable_bytes


@pytest.mark.slow
@needs_tpu
def test_what_is_offloaded_is_not_on_the_device():
    """XLA's own peak on a TPU counts it, and on-chip memory too; the report does not."""
    carries = 4 * steps.NUM_BLOCKS * steps.CARRY[0] * steps.CARRY[1]
    kept = measure_entry(entry("gradients", plan="full"), "v5e-1")
    offloaded = measure_entry(entry("gradients", plan="full+offload:carry"), "v5e-1")
    assert (kept.host_bytes, offloaded.host_bytes) == (0, carries)
    if jax.__version_info__ >= (0, 8):  # libtpu 0.0.23 holds a copy on the device all the same
        assert offloaded.peak_bytes < kept.peak_bytes - 0.9 * carries
    small = measure_entry(entry("small"), "v5e-1")
    assert small.peak_bytes < small.argument_bytes + small.output_bytes + 2**16


@pytest.mark.slow
@needs_tpu
def test_a_program_travels_and_is_what_an_entry_builds():
    step, args, _ = steps.gradients("full")
    traveled = jaxckpt.measure(step, *args, target="v5e-1")
    built = measure_entry(entry("gradients", plan="full"), "v5e-1")
    names = ("peak_bytes", "argument_bytes", "output_bytes", "alias_bytes", "flops", "target")
    for name in names:
        assert getattr(traveled, name) == getattr(built, name)
    assert "args[1]" in {one.operation for one in traveled.buffers}


@pytest.mark.slow
@needs_tpu
def test_donation_unread_arguments_and_typed_keys_travel():
    size = 1 << 20

    def step(state, unread, key, scale):
        noise = jax.random.normal(key, state["w"].shape)
        return {"w": state["w"] + scale * noise}, jax.random.split(key)

    w = jax.ShapeDtypeStruct((size,), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = ({"w": w}, w, key, 0.5)
    report = jaxckpt.measure(step, *args, target="v5e-1", donate_argnums=0, static_argnums=3)
    assert report.alias_bytes == 4 * size
    assert 4 * size <= report.argument_bytes < 5 * size  # `unread` is dropped
    plain = jaxckpt.measure(step, *args, target="v5e-1", static_argnums=3)
    assert plain.alias_bytes == 0 and plain.peak_bytes > report.peak_bytes


@needs_tpu
def test_what_does_not_fit_still_has_a_peak():
    rows = 1 << 19  # the argument alone is more than a v5e has
    step = lambda x, w: jnp.tanh(x @ w) @ w
    x = jax.ShapeDtypeStruct((rows, 8192), jnp.float32)
    report = jaxckpt.measure(step, x, jax.ShapeDtypeStruct((8192, 8192), jnp.float32),
                             target="v5e-1")  # fmt: skip
    assert report.fits is False and "refused" in report.source
    assert report.argument_bytes == 4 * 8192 * (rows + 8192)
    assert report.output_bytes == 4 * 8192 * rows + report.alias_bytes
    assert report.peak_bytes >= report.argument_bytes + report.output_bytes
    assert report.headroom_bytes == report.usable_bytes - report.peak_bytes < 0
    assert report.buffers[0].size_bytes >= 4 * 8192 * rows
    assert "too little" in str(report)


@needs_tpu
def test_what_does_not_fit_on_several_devices_is_of_one_of_them():
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((1 << 21, 8192), jnp.float32, sharding=rows)
    report = jaxckpt.measure(lambda x: jnp.tanh(x), x, target="v5e-4")
    assert report.fits is False and "refused" in report.source
    assert report.num_devices == 4
    assert report.argument_bytes == 4 * 8192 * (1 << 21) // 4


@pytest.mark.slow
@needs_tpu
def test_shardings_travel():
    mesh = AbstractMesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    both = NamedSharding(mesh, PartitionSpec("data", "model"))
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=both)
    report = jaxckpt.measure(lambda x: x + 1, x, target="v5e-4")
    assert report.argument_bytes == report.output_bytes == 4 * 1024**2 // 4
    whole = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    replicated = jaxckpt.measure(lambda x: x + 1, whole, target="v5e-4")
    assert replicated.argument_bytes == 4 * 1024**2
    assert measure_entry(entry("sharded", devices=4), "v5e-4").argument_bytes == 1024**2
    with pytest.raises(WorkerError, match=r"sharded over 4 devices \(data: 4\); target v5e-8 has"):
        measure_entry(entry("sharded", devices=4), "v5e-8")


@pytest.mark.slow
@needs_tpu
def test_a_notebook_whose_jax_has_started_can_measure():
    """Its JAX is up on eight CPU devices, as a notebook's may be; libtpu's banners stay unseen."""
    code = (
        "import jax, jax.numpy as jnp, jaxckpt\n"
        "print(jnp.ones(8).sum(), jax.device_count(), flush=True)\n"
        "x = jax.ShapeDtypeStruct((256, 256), jnp.float32)\n"
        "print(jaxckpt.measure(lambda x: x @ x, x, target='v5e-1').argument_bytes)\n"
    )
    environment = launch.environment(parse_target("h100"))
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout == f"8.0 8\n{4 * 256**2}\n"
    assert done.stderr == ""


@needs_cuda
@pytest.mark.parametrize("target", ["h100", "a100-80g", "t4"])
def test_gpus(target):
    report = measure_entry(entry("small", donate=True), target)
    size = 4 * 256**2
    assert report.argument_bytes == 2 * size and report.alias_bytes == size
    assert report.peak_bytes == size * 2 + report.output_bytes - size + report.temp_bytes
    assert report.source.startswith("XLA cuda") and report.fits
    assert jaxckpt.measure(*[small()["fn"]], *small()["args"], target=target).alias_bytes == 0


@needs_cuda
def test_the_attention_of_cudnn_is_built_where_its_chip_is_known():
    report = measure_entry(entry("cudnn_attention"), "h100")
    scores = 4 * 2 * 4 * 512 * 512  # float32 scores, which flash attention never holds
    shape = (2, 4, 512, 64)
    four_arrays = 4 * 2 * math.prod(shape)
    assert four_arrays + workspace_bytes(shape, shape) <= report.temp_bytes < scores


@needs_cuda
def test_shardings_over_gpus():
    report = measure_entry(entry("sharded", devices=8), "h100-8")
    assert report.argument_bytes == 4 * 1024**2 // 8


@pytest.mark.slow
@needs_tpu
def test_a_job_that_fails_or_dies_stops_no_other():
    jobs = [
        (entry("raises"), "v5e-1"),
        (entry("dies"), "v5e-1"),
        (entry("not_there"), "v5e-1"),
        (entry("small"), "v5e-3"),
        (entry("small"), "v5e-1"),
    ]
    raised, died, missing, unknown, report = measure_many(jobs, parallel=3)
    assert report.argument_bytes == 2 * 4 * 256**2
    assert str(raised) == "v5e-1: ValueError: no such plan: valid are others"
    assert raised.error.kind == "ValueError" and raised.error.detail.count("\n") == 1
    (note,) = raised.error.__notes__  # where it was raised, in the other process
    assert "steps.py" in note and ", in raises" in note and "no such plan:\nvalid" in note
    assert not isinstance(raised.error, UserError)
    assert "ended by SIGKILL (is this machine out of memory?)" in str(died)
    assert "has no attribute 'not_there'" in str(missing)
    assert isinstance(unknown.error, TargetError)
    for failure, (job, target) in zip((raised, died, missing, unknown), jobs, strict=False):
        assert isinstance(failure, JobFailure)
        assert (failure.entry, failure.target) == (job, target) and "\n" not in str(failure)


@needs_tpu
def test_an_interrupt_leaves_no_process_behind(monkeypatch):
    started = []
    popen = subprocess.Popen

    def start(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(launch.subprocess, "Popen", start)

    def interrupt(place, report):
        raise KeyboardInterrupt

    jobs = [(entry("dies"), "v5e-1"), *[(entry("waits"), "v5e-1")] * 4]
    with pytest.raises(KeyboardInterrupt):
        measure_many(jobs, progress=interrupt)
    assert 1 <= len(started) <= 3
    assert all(process.wait(timeout=3600) != 0 for process in started)


def test_what_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(launch, "_is_there", lambda module: False)
    for target, extra in (("v5e-1", "tpu"), ("h100", "cuda13")):
        message = f"target {target} needs a compiler that is not installed: pip install"
        with pytest.raises(Unavailable, match=re.escape(f"{message} -e '.[{extra}]'")):
            jaxckpt.measure(lambda x: x, jnp.ones(3), target=target)
        with pytest.raises(Unavailable, match=re.escape(message)):
            measure_entry(entry("small"), target)


def test_what_cannot_travel_says_what_to_do(monkeypatch):
    monkeypatch.setattr(launch, "check_available", lambda target: None)
    calls_back = lambda x: jax.pure_callback(lambda y: y, x, x)
    q = jax.ShapeDtypeStruct((2, 512, 4, 64), jnp.bfloat16)
    attend = lambda q: jax.nn.dot_product_attention(q, q, q, implementation="cudnn")
    cases = [(calls_back, q, "v5e-1")]
    if needs_cuda.name == "skip":  # with the plugin cuDNN is found by its library
        cases.append((attend, q, "h100"))
    for fn, x, target in cases:
        with pytest.raises(TravelError, match=r"build it there: .*Entry") as error:
            jaxckpt.measure(fn, x, target=target)
        assert "\n" not in str(error.value)


def test_errors_of_the_step_itself_are_its_own(monkeypatch):
    monkeypatch.setattr(launch, "check_available", lambda target: None)
    with pytest.raises(TypeError, match="incompatible shapes"):
        jaxckpt.measure(lambda x: x + jnp.ones(5), jnp.ones(3), target="v5e-1")


def test_one_mesh_at_most(monkeypatch):
    monkeypatch.setattr(launch, "check_available", lambda target: None)
    auto = (AxisType.Auto,)
    spread = [
        NamedSharding(AbstractMesh((n,), ("data",), axis_types=auto), PartitionSpec("data"))
        for n in (2, 4)
    ]
    with pytest.raises(PlacementError, match=r"arguments are sharded over .*'data': 2.* and "):
        exported.describe(spread)
    described = exported.describe([spread[0], None])
    assert json.loads(json.dumps(described)) == described
    assert described["mesh"] == [["data", 2]]
    assert [one["spec"] for one in described["arguments"]] == [["data"], None]


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        ("steps.small", {}, "entry 'steps.small' is no function that another process can import"),
        ("__main__:step", {}, "valid: 'package.module:function'"),
        ("a.b:", {}, "no function"),
        ("a:b", {"x": object()}, "arguments of entry 'a:b': Object of type object"),
    ],
)
def test_entries_that_cannot_be(function, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Entry(function=function, arguments=arguments)


def test_local_and_no_process_are_refused():
    with pytest.raises(TargetError, match=r"this process's own backend: jaxckpt.measure takes it"):
        measure_entry(entry("small"), "local")
    with pytest.raises(ValueError, match="parallel is 0"):
        measure_many([], parallel=0)
