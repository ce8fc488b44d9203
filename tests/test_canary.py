"""What this JAX and its XLA write down is what we read: exact figures, and no line passed over.

Neither promises its texts or the names of its primitives. These tests run on every JAX that the
gate has, so that a change in either is seen here first.
"""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import checkify, pallas
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxckpt.compiled.buffers import read_buffers, read_totals, read_understood
from jaxckpt.compiled.collectives import INSTRUCTION, Program, op_name, traffic
from jaxckpt.costs.flat import bodies, flatten
from jaxckpt.costs.flops import count_flops
from jaxckpt.costs.fusion import is_collective, kind_of
from jaxckpt.transforms import jaxprs
from jaxckpt.transforms.jaxprs import mean_trips, says_trips
from jaxckpt.transforms.policies import GivenPolicy
from tests import canary_program as known
from tests.compiled.test_report import REPORT

ROOT = Path(__file__).parents[1]
ARRAY_BYTES = 4 * known.SIZE**2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `canary_program` leaves."""
    folder = tmp_path_factory.mktemp("canary")
    flags = f"--xla_force_host_platform_device_count={known.DEVICES}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.canary_program", str(folder)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def text(folder) -> str:
    return (folder / "program.txt").read_text()


def test_collectives_and_trips(text):
    found = traffic(text, known.DEVICES)
    every = tuple(range(known.DEVICES))
    assert sorted(
        (c.kind, c.result_bytes, c.group, c.trips, c.loops) for c in found.collectives
    ) == [
        ("all-gather", known.DEVICES * ARRAY_BYTES, every, 1, 0),
        ("all-reduce", ARRAY_BYTES, every, 1, 0),
        ("all-reduce", ARRAY_BYTES, every, known.OUTER, 1),
        ("all-reduce", ARRAY_BYTES, every, known.OUTER * known.INNER, 2),
        ("collective-permute", ARRAY_BYTES, (0, 1), 1, 1),
    ]
    names = [c.op_name.rpartition("/")[2] for c in found.collectives]
    assert sorted(names) == ["all_gather", "pmax", "pmin", "ppermute", "psum"]
    assert found.understood.is_all and found.understood.of > 50, str(found.understood)


def test_the_largest_buffer_its_operation_and_its_line(folder):
    largest, *rest = read_buffers(folder / "dump")
    assert largest.size_bytes == known.DEVICES * ARRAY_BYTES
    assert largest.shape == f"f32[{known.DEVICES * known.SIZE},{known.SIZE}]"
    assert largest.operation.endswith("/all_gather")
    assert largest.source.endswith(f"canary_program.py:{known.GATHER_LINE}")
    assert rest[0].size_bytes == ARRAY_BYTES
    read = read_understood(folder / "dump")
    assert read.is_all and read.of > 50, str(read)


def test_totals_are_those_of_memory_analysis(folder):
    totals, sizes = read_totals(folder / "dump"), json.loads((folder / "sizes.json").read_text())
    assert totals.argument_bytes == sizes["argument"] == ARRAY_BYTES + 4
    assert totals.output_bytes == sizes["output"] and totals.alias_bytes == sizes["alias"] == 0
    least = sizes["argument"] + sizes["output"] + sizes["temp"]
    assert least <= totals.total_bytes < least + 4096  # constants


def test_the_executors_loops_say_their_trips_compiled_too(folder):
    program = Program((folder / "executed.txt").read_text())
    found = [line for lines in program.lines.values() for line in lines]
    loops = [line for line in found if INSTRUCTION.match(line)[4] == "while"]
    said = [line for line in loops if says_trips(op_name(line))]
    assert said and all(map(program.knows_loop, loops))
    # No loop's bound is in the text: eight rows run seven blocks in all.
    assert {program.trips(line) for line in said} == {7 / 8}
    assert program.understood.is_all


def test_the_executors_loops_say_their_trips_in_the_jaxpr():
    every = [mean_trips(e) for e in jaxprs.equations(known.executed().jaxpr) if is_while(e)]
    assert {float(trips) for trips in every if trips != 1} == {7 / 8}


def is_while(equation) -> bool:
    return equation.primitive.name == jaxprs.WHILE


SLIPS = {
    "an instruction": (r" = f32\[128,128\]\{1,0\} multiply\(", r" : f32[128,128] multiply("),
    "a computation's header": (r"^(ENTRY )?%(\S+) \((.*)\{$", r"\1%\2 {\3"),
    "the entry": (r"^ENTRY ", ""),
    "a group": (r"replica_groups=[^ ]+", "replica_groups=<all>,"),
    "a loop's body": (r", body=%", ", block=%"),
    "a kind": (r" all-gather\(", " all-gather-into("),
    "the module's line": (r"^HloModule ", "Module "),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_another_form_is_seen(text, slip):
    """The twin of the tests above: a text that XLA might write tomorrow is not taken for read."""
    changed = re.sub(*SLIPS[slip], text, flags=re.M)
    assert changed != text
    assert not traffic(changed, known.DEVICES).understood.is_all


DUMPS = {
    "values": ("-buffer-assignment.txt", r"\(size=", "(bytes="),
    "allocations": ("-buffer-assignment.txt", r"^allocation", "Allocation"),
    "the total": ("-memory-usage-report.txt", r"^Total bytes", "Sum of bytes"),
    "metadata": (".txt", r" metadata=\{", " metadata=<"),
    "the peak": ("-live-range.txt", r"\(peak\)", "(highest)"),
    "the table of frames": (".txt", r"^StackFrames$", "Frames"),
}


@pytest.mark.parametrize("slip", DUMPS)
def test_another_form_of_a_dump_is_seen(folder, tmp_path, slip):
    end, pattern, new = DUMPS[slip]
    changed = False
    for path in (folder / "dump").glob("*after_optimizations*.txt"):
        old = path.read_text()
        made = (
            re.sub(pattern, new, old, flags=re.M)
            if path.name.endswith(f"optimizations{end}")
            else old
        )
        changed |= made != old
        (tmp_path / path.name).write_text(made)
    if not changed:
        pytest.skip("this XLA does not write it")
    read = read_understood(tmp_path)
    assert not read.is_all
    shown = dataclasses.replace(REPORT, understood=read)
    assert str(shown).endswith(f"understood {read.lines} of {read.of} lines of XLA's text")


def test_a_text_that_was_understood_is_not_spoken_of(folder):
    shown = dataclasses.replace(REPORT, understood=read_understood(folder / "dump"))
    assert "understood" not in str(shown)


# --- names of primitives ---


def bound(fn, *args) -> set[str]:
    """Returns the names of all primitives that a function binds."""
    return {e.primitive.name for e in jaxprs.equations(jax.make_jaxpr(fn)(*args))}


X, KEY = jnp.ones((8, 8)), jax.random.key(0)
MESH = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
CUT, WHOLE = PartitionSpec("d"), PartitionSpec()


def mapped(fn, out=CUT, **options):
    return jax.shard_map(fn, mesh=MESH, in_specs=CUT, out_specs=out, **options)


@jax.custom_jvp
def custom_jvp(x):
    return jnp.sin(x)


custom_jvp.defjvp(lambda primals, tangents: (custom_jvp(*primals), jnp.cos(*primals) * tangents[0]))


def custom_vmap(x):
    fn = jax.custom_batching.custom_vmap(lambda x: jnp.sin(x))
    fn.def_vmap(lambda size, is_batched, x: (jnp.sin(x), True))
    return fn(x)


@jax.custom_vjp
def custom_vjp(x):
    return jnp.sin(x)


custom_vjp.defvjp(lambda x: (jnp.sin(x), x), lambda x, grad: (grad * jnp.cos(x),))


def copied(x):
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...]

    return pallas.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


# What is asked of JAX -> the row of the table that has to know what it binds.
PROBES = {
    "jit": ("JITS", jax.jit(jnp.sin)),
    "checkpoint": ("REMATS", jax.checkpoint(jnp.sin)),
    "checkpoint, differentiated": ("REMATS", jax.grad(lambda x: jax.checkpoint(jnp.sin)(x).sum())),
    "custom_jvp": ("CUSTOM_JVPS", custom_jvp),
    "custom_vjp": ("CUSTOM_VJPS", custom_vjp),
    "custom_vmap": ("CUSTOM_VMAPS", custom_vmap),
    "relu": ("CUSTOM_JVPS", jax.nn.relu),
    "scan": ("SCAN", lambda x: lax.scan(lambda c, row: (c + row, c), x[0], x)),
    "fori_loop": ("SCAN", lambda x: lax.fori_loop(0, 3, lambda i, c: c + i, x)),
    "while": ("WHILE", lambda x: lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c + 1, x)),
    "cond": ("COND", lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x)),
    "switch": ("COND", lambda x: lax.switch(1, [jnp.sin, jnp.cos], x)),
    "platforms": ("COND", lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos)),
    "shard_map": ("SHARD_MAP", mapped(jnp.sin)),
    "pallas_call": ("PALLAS", copied),
    "dot_general": ("DOT", lambda x: x @ x),
    "einsum": ("DOT", lambda x: jnp.einsum("ij,kj->ik", x, x)),
    "ragged_dot": ("RAGGED_DOT", lambda x: lax.ragged_dot(x, x[None], jnp.array([8]))),
    "conv": ("CONV", lambda x: lax.conv(x[None, None], x[None, None], (1, 1), "SAME")),
    "name": ("TAG", lambda x: checkpoint_name(x, "q")),
    "device_put": ("PUT", lambda x: jax.device_put(x, jax.devices()[0])),
    "to the host": ("PUT", lambda x: jax.device_put(x, jax.memory.Space.Host)),
    "reduce_precision": ("ROUND", lambda x: lax.reduce_precision(x, 8, 7)),
    "convert_element_type": ("CAST", lambda x: x.astype(jnp.bfloat16)),
    "copy": ("COPIES", lambda x: jnp.array(x, copy=True)),
    "optimization_barrier": ("BARRIER", lax.optimization_barrier),
    "check": ("CHECK", lambda x: checkify.check(x[0, 0] > 0, "negative")),
    "sharding_constraint": (
        "PLACEMENTS",
        lambda x: lax.with_sharding_constraint(x, NamedSharding(MESH, CUT)),
    ),
    "a const in a map": ("PLACEMENTS", mapped(lambda x: x + jnp.arange(8.0))),
    "broadcast": ("BROADCAST", lambda x: jnp.broadcast_to(x, (2, 8, 8))),
    "bitcast": ("BITCAST", lambda x: lax.bitcast_convert_type(x, jnp.int32)),
    "reshape": ("SHAPES", lambda x: x.reshape(-1)),
    "squeeze": ("SHAPES", lambda x: lax.squeeze(x[:1], (0,))),
    "transpose": ("SHAPES", lambda x: x.T),
    "slice": ("SLICES", lambda x: x[1:3]),
    "dynamic_slice": ("SLICES", lambda x: lax.dynamic_slice(x, (x[0, 0].astype(int), 0), (2, 2))),
    "gather": ("SLICES", lambda x: x[jnp.array([0, 2])]),
    "split": ("SLICES", lambda x: jnp.split(x, 2)),
    "concatenate": ("JOINS", lambda x: jnp.concatenate([x, x])),
    "stack": ("JOINS", lambda x: jnp.stack([x, x])),
    "pad": ("JOINS", lambda x: jnp.pad(x, 1)),
    "dynamic_update_slice": ("UPDATE", lambda x: lax.dynamic_update_slice(x, x[:1], (1, 0))),
    "cumsum": ("CUMULATIVE", lambda x: lax.cumsum(x)),
    "cumprod": ("CUMULATIVE", lambda x: lax.cumprod(x)),
    "cummax": ("CUMULATIVE", lambda x: lax.cummax(x)),
    "cummin": ("CUMULATIVE", lambda x: lax.cummin(x)),
    "cumlogsumexp": ("CUMULATIVE", lambda x: lax.cumlogsumexp(x)),
    "sort": ("SORTS", lambda x: lax.sort(x)),
    "top_k": ("SORTS", lambda x: lax.top_k(x, 2)),
    "fft": ("SORTS", jnp.fft.fft),
    "random bits": ("RANDOM_BITS", lambda x: jax.random.bits(KEY, x.shape)),
    "dropout": ("RANDOM_BITS", lambda x: jax.random.bernoulli(KEY, 0.1, x.shape)),
    "psum": ("ALL_REDUCES", mapped(lambda x: lax.psum(x, "d"), WHOLE)),
    "psum, unchecked": ("ALL_REDUCES", mapped(lambda x: lax.psum(x, "d"), WHOLE, check_vma=False)),
    "pmean": ("ALL_REDUCES", mapped(lambda x: lax.pmean(x, "d"), WHOLE)),
    "pmax": ("ALL_REDUCES", mapped(lambda x: lax.pmax(x, "d"), WHOLE)),
    "pmin": ("ALL_REDUCES", mapped(lambda x: lax.pmin(x, "d"), WHOLE)),
    "all_gather": ("GATHERS", mapped(lambda x: lax.all_gather(x, "d", tiled=True))),
    "psum_scatter": ("GATHERS", mapped(lambda x: lax.psum_scatter(x, "d", tiled=True))),
    "all_gather, differentiated": (
        "GATHERS",
        jax.grad(lambda x: mapped(lambda x: lax.all_gather(x, "d", tiled=True))(x).sum()),
    ),
    "all_to_all": ("EXCHANGES", mapped(lambda x: lax.all_to_all(x, "d", 1, 0, tiled=True))),
    "ppermute": ("EXCHANGES", mapped(lambda x: lax.ppermute(x, "d", [(0, 0)]))),
    "where": ("SELECT", lambda x: jnp.where(x > 0, x, 0.0)),
    "cube": ("INTEGER_POWER", lambda x: x**3),
}
for made in (jnp.tanh, jax.nn.sigmoid, jnp.exp, jnp.exp2, jnp.expm1, jnp.sqrt, lax.rsqrt, jnp.cbrt):
    PROBES[made.__name__] = ("RULES_READ_RESULT", made)
for made in (jnp.tan, lax.erf_inv, jnp.max, jnp.min):
    PROBES[made.__name__] = ("RULES_READ_RESULT", made)
PROBES |= {
    "maximum": ("RULES_READ_RESULT", lambda x: jnp.maximum(x, 2.0)),
    "minimum": ("RULES_READ_RESULT", lambda x: jnp.minimum(x, 2.0)),
    "power": ("RULES_READ_RESULT", lambda x: x**2.5),
}


def table() -> dict[str, set[str]]:
    """Returns the rows of `jaxprs`' table: every constant of one or several names."""
    is_row = lambda name: name.isupper() and not name.startswith("_")
    rows = {name: value for name, value in vars(jaxprs).items() if is_row(name)}
    return {name: {value} if isinstance(value, str) else {*value} for name, value in rows.items()}


@pytest.mark.parametrize("probe", PROBES)
def test_the_table_knows_what_is_bound(probe):
    row, fn = PROBES[probe]
    assert bound(fn, X) & table()[row], f"jax {jax.__version__} binds {bound(fn, X)}"


def test_every_row_of_the_table_has_a_probe():
    # Bound for a chip alone, joined from other rows, beginnings of names, and our own.
    elsewhere = {name for name in table() if name.startswith("CUDNN")}
    elsewhere |= {"CALLS", "SCATTERS", "REDUCTIONS", "SCHEDULE", "REVERSE_ONLY"}
    assert table().keys() - elsewhere == {row for row, _ in PROBES.values()}


def test_names_that_begin_alike():
    kinds = lambda fn: {kind_of(step) for step in flatten(jax.make_jaxpr(fn)(X)).steps}
    assert "scatter" in kinds(lambda x: x.at[jnp.array([1, 2])].add(1.0))
    assert "scatter" in kinds(lambda x: x.at[jnp.array([1, 2])].set(1.0))
    for reduction in (jnp.sum, jnp.max, jnp.min, jnp.prod, jnp.argmax, jnp.argmin, jnp.any):
        assert "reduce" in kinds(reduction), reduction
    assert kinds(lambda x: lax.reduce_precision(x, 8, 7)) == {"fused"}


@pytest.mark.parametrize("probe", [name for name, (row, _) in PROBES.items() if row in (
    "JITS", "REMATS", "CUSTOM_JVPS", "CUSTOM_VJPS", "CUSTOM_VMAPS")])  # fmt: skip
def test_calls_are_opened(probe):
    flat = flatten(jax.make_jaxpr(PROBES[probe][1])(X))
    assert flat.steps and not {step.name for step in flat.steps} & jaxprs.CALLS


@pytest.mark.parametrize("probe", [name for name, (row, _) in PROBES.items() if row in (
    "ALL_REDUCES", "GATHERS", "EXCHANGES")])  # fmt: skip
def test_collectives_are_no_elementwise_work(probe):
    steps = flatten(jax.make_jaxpr(PROBES[probe][1])(X)).steps
    inside = [step for outer in steps for body in bodies(outer) for step in body.steps]
    found = [step for step in inside if is_collective(step)]
    assert found and {kind_of(step) for step in found} == {"whole"}
    assert not any(map(is_collective, flatten(jax.make_jaxpr(mapped(jnp.sin))(X)).steps))


def test_flops_of_nested_loops_are_exact():
    def fn(x):
        x, _ = lax.scan(
            lambda x, _: (lax.fori_loop(0, 5, lambda _, x: x @ x, x), None), x, length=3
        )
        return lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

    assert count_flops(jax.make_jaxpr(fn)(X)) == 2 * 8**3 * (3 * 5 + 1)


def test_no_other_file_spells_a_primitive():
    names = {name for row in table().values() for name in row if re.search("[_-]", name)}
    for path in (ROOT / "jaxckpt").rglob("*.py"):
        if path.name == "jaxprs.py":
            continue
        nodes = ast.walk(ast.parse(path.read_text()))
        found = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not found & names, f"{path} spells {found & names}"


def test_what_the_policies_of_jax_answer_is_known():
    """Also what keeps some names and moves others, whose answers are no booleans."""
    policy = GivenPolicy(
        jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=["kept"],
            names_which_can_be_offloaded=["moved"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    )
    block = lambda x: checkpoint_name(jnp.sin(checkpoint_name(jnp.sin(x), "kept")), "moved").sum()
    jaxpr = jax.make_jaxpr(block)(X).jaxpr
    asked = lambda e: policy(e.primitive, *(x.aval for x in e.invars), **e.params)
    answers = [asked(equation) for equation in jaxpr.eqns]
    assert len({type(answer) for answer in answers}) == 3, answers
