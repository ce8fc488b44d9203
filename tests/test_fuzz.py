"""Anything at all as input: only clear errors, in one line, and never a traceback.

The gate takes a sample; under `heavy` it is 10,000 inputs in all.
"""

import json
import string
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.config import ConfigError, OptimizerConfig, TrainConfig, load_toml
from experiments.reporting.reading import read_all
from experiments.weights.load import check_weights
from experiments.weights.shards import Shards, read_json
from jaxckpt.models.config import TransformerConfig
from jaxckpt.plans import Plan, PlanError, words
from tests.experiments.report_rows import row

MODEL = TransformerConfig(num_blocks=1, d_model=8, num_heads=1, num_kv_heads=1, head_dim=4, d_ff=8)


def sizes(gate: int, heavy: int):
    """Runs a test twice: with a few inputs in the gate, with many under `heavy`."""
    return pytest.mark.parametrize("count", [gate, pytest.param(heavy, marks=pytest.mark.heavy)])


def fuzz(count: int, strategy, check):
    """Calls `check` with so many inputs, the same ones every time."""
    fixed = settings(max_examples=count, derandomize=True, database=None)
    fixed(given(strategy)(check))()


def one_line(error: Exception):
    assert str(error).strip() and "\n" not in str(error).strip(), str(error)


WORDS = [
    *words.SCHEDULES,
    *words.POLICIES,
    "carry",
    "q,k",
    "*",
    "4",
    "0",
    "-1",
    "14x",
    "99999999999",
]
STAGES = ["sqrt", "4xsqrt", "uniform:2+dots", "2xuniform:2", "3xattention+names:q,k", "log", "none"]
STAGES += ["1xnone", "binomial:3", "offload:carry", "5xevery:2+offload:m*", "1xfull"]
GOOD_PLANS = st.lists(st.sampled_from(STAGES), min_size=1, max_size=3).map("/".join)


def with_a_slip(text: str, place: int, letters: str) -> str:
    """Returns text with one character taken out, or replaced."""
    place %= len(text)
    return text[:place] + letters + text[place + 1 :]


PLANS = st.one_of(
    GOOD_PLANS,
    st.builds(with_a_slip, GOOD_PLANS, st.integers(0, 60), st.text(max_size=2)),
    st.text(max_size=30),
    st.lists(st.sampled_from([*WORDS, "/", "+", ":", ",", "x", " "]), max_size=12).map("".join),
)


@sizes(gate=150, heavy=5000)
def test_plans(count):
    seen = {"good": 0, "bad": 0}

    def check(text):
        try:
            plan = Plan.parse(text)
        except PlanError as error:
            seen["bad"] += 1
            assert (
                str(error).startswith("plan ") or "stage" in str(error) or repr(text) in str(error)
            )
            return
        seen["good"] += 1
        assert Plan.parse(str(plan)) == plan and hash(plan) is not None
        for blocks in (0, 1, 7):
            try:
                bound = plan.bind(blocks)
            except PlanError as error:
                one_line(error)
            else:
                assert bound.num_blocks == blocks == sum(stage.count for stage in bound.stages)

    fuzz(count, PLANS, check)
    assert min(seen.values()) > count // 50, seen


FIELDS = [
    name
    for owner in (TrainConfig, TransformerConfig, OptimizerConfig)
    for name in owner.__dataclass_fields__
]
VALUES = st.one_of(
    st.integers(-3, 2**40),
    st.floats(),
    st.booleans(),
    st.text(max_size=8),
    st.sampled_from(["sqrt", "auto", "15GiB", "adamw", "bf16", "full"]),
    st.lists(st.text(max_size=3), max_size=2),
)


def toml_value(value: object) -> str:
    if isinstance(value, float):
        return {"inf": "inf", "-inf": "-inf", "nan": "nan"}.get(repr(value), repr(value))
    return json.dumps(value)


def tables(owner: type, usual: object):
    """Returns tables of one kind: usual values, and now and then anything under any name."""
    known = {name: value for name, value in vars(usual).items() if isinstance(value, str | int)}
    good = st.sampled_from(sorted(known.items()))
    odd = st.tuples(st.sampled_from(FIELDS), VALUES)
    wrong = st.tuples(st.sampled_from([*owner.__dataclass_fields__]), VALUES)
    return st.lists(st.one_of(good, good, good, wrong, odd), max_size=3).map(dict)


OWNERS = (
    (TrainConfig, TrainConfig()),
    (TransformerConfig, MODEL),
    (OptimizerConfig, OptimizerConfig()),
)
TOML = st.one_of(
    st.binary(max_size=40),
    st.text(alphabet=string.printable, max_size=40).map(str.encode),
    st.tuples(*(tables(*owner) for owner in OWNERS)).map(
        lambda found: "\n".join(
            head + "\n".join(f"{name} = {toml_value(value)}" for name, value in table.items())
            for head, table in zip(("", "[model]\n", "[optimizer]\n"), found, strict=True)
        ).encode("utf-8", "surrogatepass")
    ),
)


@sizes(gate=100, heavy=3000)
def test_configurations(count, tmp_path):
    path, seen = tmp_path / "x.toml", {"good": 0, "bad": 0}

    def check(content):
        path.write_bytes(content)
        try:
            flags = load_toml(path)
        except ConfigError as error:
            seen["bad"] += 1
            one_line(error)
            return
        seen["good"] += 1
        values = {name.replace("-", "_"): value for name, value in flags.items()}
        values["kind"] = values.pop("optimizer", "adamw")
        parts = {
            owner: {name: values[name] for name in owner.__dataclass_fields__ if name in values}
            for owner in (TransformerConfig, OptimizerConfig, TrainConfig)
        }
        try:  # what the command line makes of them, types aside
            model = TransformerConfig(**parts[TransformerConfig])
            optimizer = OptimizerConfig(**parts[OptimizerConfig])
            _ = TrainConfig(**parts[TrainConfig] | {"model": model, "optimizer": optimizer}).plan
        except ValueError as error:  # ConfigError and PlanError are
            one_line(error)

    fuzz(count, TOML, check)
    assert min(seen.values()) > count // 50, seen


HEADER = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def file_bytes(header: object, size: int | None = None, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 99) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3)
    ),
    max_leaves=6,
)
SAFETENSORS = st.one_of(
    st.binary(max_size=60),
    st.builds(file_bytes, JSON),
    st.builds(file_bytes, st.just(HEADER), st.integers(0, 2**63), st.binary(max_size=20)),
    st.tuples(st.integers(0, 100), st.binary(max_size=3)).map(
        lambda cut: file_bytes(HEADER)[: cut[0]] + cut[1] + file_bytes(HEADER)[cut[0] + 2 :]
    ),
)
INDEXES = st.one_of(
    st.none(),
    st.binary(max_size=30),
    JSON.map(lambda found: json.dumps({"weight_map": found}).encode()),
)


@sizes(gate=60, heavy=1200)
def test_weights(count):
    def check(found):
        content, index = found
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            single = index is None
            (folder / ("model.safetensors" if single else "a.safetensors")).write_bytes(content)
            if not single:
                (folder / "model.safetensors.index.json").write_bytes(index)
            before = sorted(folder.iterdir())
            for read in (lambda: Shards(folder), lambda: check_weights(folder, MODEL)):
                try:
                    read()
                except ConfigError as error:
                    one_line(error)
            try:
                read_json(folder / "model.safetensors.index.json")
            except ConfigError as error:
                one_line(error)
            assert sorted(folder.iterdir()) == before

    fuzz(count, st.tuples(SAFETENSORS, INDEXES), check)


ROWS = st.lists(
    st.one_of(
        st.binary(max_size=20),
        JSON.map(lambda found: json.dumps(found).encode()),
        st.tuples(st.sampled_from([*row("full")]), JSON).map(
            lambda change: json.dumps(row("full") | {change[0]: change[1]}).encode()
        ),
    ),
    max_size=4,
)


@sizes(gate=40, heavy=700)
def test_rows_of_a_report(count, tmp_path):
    def check(lines):
        (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
        try:
            found = read_all([tmp_path])
        except ConfigError as error:
            one_line(error)
        else:
            assert len(found.points) + len(found.failed) <= len(b"\n".join(lines).splitlines())

    fuzz(count, ROWS, check)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with one checkpoint, and the abstract state that it holds."""
    import dataclasses

    import jax

    from experiments.training.checkpoints import Checkpoints, about_run
    from experiments.training.step import init_state, resolve_model

    folder = tmp_path_factory.mktemp("run")
    model = dataclasses.replace(MODEL, vocab_size=16)
    config, _ = resolve_model(TrainConfig(model=model, seq_len=8, batch_size=1))
    state = jax.jit(lambda: init_state(config))()
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(state, about_run(config, "0" * 64, 0))
    checkpoints.wait()
    checkpoints.close()
    return folder, jax.eval_shape(lambda: init_state(config))


@pytest.mark.heavy
# Of a load that fails, Orbax leaves coroutines behind that nobody waits for.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine.*was never awaited:RuntimeWarning")
def test_checkpoint_folders(saved, tmp_path):
    import shutil

    from experiments.training.checkpoints import Checkpoints

    folder, like = saved
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    copy, seen = tmp_path / "copy", {"good": 0, "bad": 0}

    def check(change):
        name, place, patch = change
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        path = copy / name
        if patch is None:
            path.unlink()
        else:
            content = path.read_bytes()
            place = place % (len(content) + 1)
            path.write_bytes(content[:place] + patch + content[place + max(1, len(patch)) :])
        checkpoints = Checkpoints(copy, keep=1)
        try:
            step = checkpoints.latest()
            if step is not None:
                checkpoints.about(step)
                checkpoints.load(step, like)
            seen["good"] += 1
        except ConfigError as error:
            seen["bad"] += 1
            one_line(error)
        finally:
            checkpoints.close()

    changes = st.tuples(
        st.sampled_from(names), st.integers(0, 10**6), st.none() | st.binary(max_size=4)
    )
    fuzz(100, changes, check)
    assert min(seen.values()) > 0, seen
