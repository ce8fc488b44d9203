"""`MemoryReport` and what it is made of: compilers' texts read as numbers and buffers."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxckpt.compiled import peak
from jaxckpt.compiled.buffers import Buffer, SourceLines, read_buffers, read_totals
from jaxckpt.compiled.report import MemoryReport
from tests.memory import steps

GIB = 1 << 30
TEXTS = json.loads((Path(__file__).parent / "oom_texts.json").read_text())

REPORT = MemoryReport(
    **{"peak_bytes": 3 * GIB, "argument_bytes": GIB, "output_bytes": GIB, "alias_bytes": 0},
    **{"temp_bytes": GIB, "host_bytes": 0, "code_bytes": 0, "flops": 10**12, "target": "v5e-1"},
    **{"source": "XLA tpu, compiler's peak", "jax_version": "1"},
)


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case["from"])
def test_refusals_of_libtpu(case):
    found = peak.parse(case["text"])
    assert found.needed_bytes == int(case["needed_gib"] * GIB)
    available = case["available_gib"]
    assert found.available_bytes == (None if available is None else int(available * GIB))
    assert found.is_total == case["is_total"]


@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem.",
        "INTERNAL: RET_CHECK failure",
        "",
    ],
)
def test_other_errors_are_not_refusals(text):
    assert peak.parse(text) is None


def test_headroom():
    assert REPORT.usable_bytes is REPORT.headroom_bytes is REPORT.fits is None
    small, large = (dataclasses.replace(REPORT, usable_bytes=n * GIB) for n in (2, 4))
    assert (small.headroom_bytes, small.fits) == (-GIB, False)
    assert (large.headroom_bytes, large.fits) == (GIB, True)
    assert "1.00 GiB too little" in str(small) and "1.00 GiB left" in str(large)


def test_json_and_back():
    buffers = (Buffer(size_bytes=4, shape="f32[]", operation="add", source="a.py:1"),)
    report = dataclasses.replace(REPORT, buffers=buffers, compile_seconds=2.5)
    again = MemoryReport.from_json(json.loads(json.dumps(report.as_json())))
    assert again == report and again.compile_seconds == 2.5
    assert dataclasses.replace(report, compile_seconds=9.0) == report
    with pytest.raises(TypeError):
        MemoryReport.from_json(report.as_json() | {"colour": 1})


def test_the_text_shows_five_buffers():
    one = Buffer(size_bytes=GIB, shape="f32[2]", operation="jit(f)/a/b/c/mul", source="a.py:1")
    text = str(dataclasses.replace(REPORT, buffers=(one,) * 7))
    assert text.count("1.00 GiB  f32[2]  .../b/c/mul  a.py:1") == 5
    assert "largest buffers" not in str(REPORT)


def test_buffers_of_a_dump(tmp_path):
    """The stack's residuals are found, with their operation and a line of a file."""
    step, args, _ = steps.gradients("full")
    compiled = jax.jit(step).lower(*args).compile(compiler_options={"xla_dump_to": str(tmp_path)})
    largest, *rest = read_buffers(tmp_path)
    carries = steps.NUM_BLOCKS * steps.CARRY[0] * steps.CARRY[1] * 4
    assert largest.size_bytes == carries
    assert largest.shape == f"f32[{steps.NUM_BLOCKS},4096,2048]"
    assert "dynamic_update_slice" in largest.operation or "broadcast" in largest.operation
    assert largest.source.rpartition(":")[2].isdigit()
    assert all(one.size_bytes <= carries for one in rest)
    stats, totals = compiled.memory_analysis(), read_totals(tmp_path)
    assert totals.argument_bytes == stats.argument_size_in_bytes
    total = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    assert total <= totals.total_bytes < total + 4096  # constants
    assert sum(one.size_bytes for one in (largest, *rest)) <= totals.total_bytes


def test_donated_arguments_in_a_dump(tmp_path):
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    lowered = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x)
    lowered.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    totals = read_totals(tmp_path)
    assert totals.argument_bytes == totals.output_bytes == totals.alias_bytes == 4 * 256**2


def test_dumps_that_are_not_understood_are_no_error(tmp_path):
    assert read_buffers(tmp_path) == () and read_totals(tmp_path) is None
    stem = tmp_path / "module_0001.after_optimizations"
    for end in ("-memory-usage-report.txt", "-buffer-assignment.txt", "-live-range.txt", ".txt"):
        Path(f"{stem}{end}").write_bytes(b"Total bytes: 12\n\xff allocation of another shape\n")
    assert read_buffers(tmp_path) == ()
    assert read_totals(tmp_path) is None
    Path(f"{stem}-buffer-assignment.txt").write_text(
        "allocation 0: size 12, parameter 0, shape |f32[3]| at ShapeIndex {}:\n value: nonsense\n"
        "allocation 1: size 99, color 5, preallocated-temp:\n"
    )
    assert read_buffers(tmp_path) == ()
    totals = read_totals(tmp_path)
    assert totals.total_bytes == totals.argument_bytes == 12  # color 5 is the host's memory


def test_source_lines_of_both_forms():
    assert SourceLines("").of('source_file="a.py" source_line=3') == "a.py:3"
    program = (
        'FileNames\n1 "mine.py"\n2 "/x/site-packages/jax/lax.py"\n\n'
        "FileLocations\n1 {file_name_id=1 line=7}\n2 {file_name_id=2 line=9}\n\n"
        "StackFrames\n1 {file_location_id=1 parent_frame_id=1}\n"
        "2 {file_location_id=2 parent_frame_id=2}\n\n"
    )
    assert SourceLines(program).of("stack_frame_id=2") == "mine.py:7"
    other = program.replace("=1 parent_frame_id=1", "=1 parent_frame_id=0")
    assert SourceLines(other.replace("parent_frame_id=2", "parent_frame_id=1")).of(
        "stack_frame_id=2"
    ) == "mine.py:7"  # fmt: skip
    assert SourceLines(program).of("") == SourceLines(program).of("stack_frame_id=5") == ""
