"""A new schedule, policy, chip or adapter is one file and one row of a table: one of each is added.

What each adds is the file that CONTRIBUTING speaks of; the row goes into the library's own table,
and all that follows is used as a user uses it.
"""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.costs.flops import count_flops
from jaxckpt.costs.roofline import Rates, rates_of
from jaxckpt.plans import words
from jaxckpt.schedules.actions import Action, Advance, Free, Load, Record, Reverse, Store
from jaxckpt.schedules.schedule import Schedule
from jaxckpt.targets.chips import CHIPS, Gpu, nvidia, tpu
from jaxckpt.targets.gpu_config import target_config
from jaxckpt.targets.present import chip_of_device
from jaxckpt.targets.target import TargetError, names, parse_target
from tests.transforms import cases

NUM_BLOCKS, ROWS, WIDTH = 8, 4, 16
HERE = __name__
ROOT = Path(__file__).parents[1]
PLANS = ("full", "tanh", "dots", "dots+tanh")


def halves(num_blocks: int) -> Schedule:
    """Returns the schedule that keeps two inputs and runs forward from them for every block."""
    middle = num_blocks // 2
    actions: list[Action] = [Store(0), Advance(0, middle), Store(1), Advance(middle, num_blocks)]
    for slot, start, stop in ((1, middle, num_blocks), (0, 0, middle)):
        for block in reversed(range(start, stop)):
            actions.append(Load(slot))
            if block == start:
                actions.append(Free(slot))
            else:
                actions.append(Advance(start, block))
            actions += [Record(block, block + 1), Reverse(block)]
    return Schedule(num_blocks=num_blocks, actions=tuple(actions), name="halves")


def keeps_tanh(primitive, *_, **__) -> bool:
    """Keeps what `tanh` returns."""
    return primitive.name == "tanh"


def stack(plan: str):
    """Returns a loss of a stack under a plan, and its arguments."""
    w = jax.random.normal(jax.random.key(0), (NUM_BLOCKS, WIDTH, WIDTH)) / 4
    x = jax.random.normal(jax.random.key(1), (ROWS, WIDTH))
    block = lambda x, w: x + jnp.tanh(x @ w)
    return (lambda w, x: jaxckpt.scan_blocks(block, w, x, remat=plan).sum()), w, x


def gradients(plan: str):
    loss, *args = stack(plan)
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(*args)


def assert_gradients_of_none(plan: str):
    for one, other in zip(gradients(plan), gradients("none"), strict=True):
        assert jnp.abs(one - other).max() <= 1e-6 * jnp.abs(other).max()


def test_a_schedule_is_a_file_and_a_row(monkeypatch):
    with pytest.raises(jaxckpt.PlanError, match="'halves' is not a schedule"):
        jaxckpt.Plan.parse("halves")
    row = words.ScheduleWord(
        policies=words.CARRY_ONLY, meaning="two inputs are kept", makes=f"{HERE}:halves"
    )
    monkeypatch.setitem(words.SCHEDULES, "halves", row)
    assert str(jaxckpt.Plan.parse("2xfull/halves")) == "2xfull/halves"
    assert_gradients_of_none("halves")
    assert_gradients_of_none("2xnone/halves")
    # Each half runs its blocks before the one that is reversed: 3 + 2 + 1, twice, beside 2 L.
    assert halves(NUM_BLOCKS).extra_forwards == 8 + 2 * 6
    assert cases.count_evaluations(NUM_BLOCKS, "halves").total == 8 + 8 + 2 * 6
    assert cases.count_evaluations(NUM_BLOCKS, "none").total == 8
    with pytest.raises(NotImplementedError, match="halves needs the schedule executor"):
        cases.count_evaluations(NUM_BLOCKS, "halves", nested=True)
    with pytest.raises(jaxckpt.PlanError, match="halves takes offload:carry, not dots"):
        jaxckpt.Plan.parse("halves+dots")


def test_a_policy_is_a_file_and_a_row(monkeypatch):
    with pytest.raises(jaxckpt.PlanError, match="'tanh' is not a schedule or policy"):
        jaxckpt.Plan.parse("tanh")
    row = words.PolicyWord(meaning="what tanh returns is kept", saves=f"{HERE}:keeps_tanh")
    monkeypatch.setitem(words.POLICIES, "tanh", row)
    assert str(jaxckpt.Plan.parse("tanh+dots")) == "dots+tanh"
    assert_gradients_of_none("tanh")
    assert_gradients_of_none("dots+tanh")
    # What tanh returns is kept beside the carry; the product is not read again then.
    block = lambda x, w: jnp.tanh(x @ w)
    args = jnp.ones([WIDTH, WIDTH]), jnp.ones([ROWS, WIDTH])
    kept = {plan: jaxckpt.explain(block, *args, plan=plan).saved_bytes for plan in PLANS}
    carry = 4 * ROWS * WIDTH
    assert kept == {"full": carry, "tanh": 2 * carry, "dots": 2 * carry, "dots+tanh": 2 * carry}


def test_a_gpu_is_a_row(monkeypatch):
    with pytest.raises(TargetError, match="target 'x100' is not known"):
        parse_target("x100")
    chip = nvidia(
        "x100",
        memory_bytes=100 << 30,
        tflops=1000,
        gb_per_second=5000,
        pcie=63.0,
        nvlink=900,
        network=400,
        gpu=Gpu((9, 0), 100, 128, 2.0, 1 << 20),
        kinds=("NVIDIA X100", "NVIDIA X100 PCIe"),
        source="a test",
    )
    monkeypatch.setitem(CHIPS, "x100", chip)
    target = parse_target("x100-16")
    assert (target.num_devices, target.usable_bytes) == (16, 75 << 30)
    assert {"x100", "x100-8"} <= set(names())
    assert chip_of_device("X100 PCIe") is chip_of_device("NVIDIA X100") is chip
    assert rates_of(target) == Rates.of_chip(chip) != Rates.of_chip(CHIPS["h100"])
    text = target_config(chip)
    assert "core_count: 100\n" in text and 'device_description_str: "NVIDIA X100"' in text


def test_a_tpu_is_a_row(monkeypatch):
    chip = tpu(
        "v9x",
        gibibytes=64,
        usable_gib=31.5,
        tflops=1000,
        gb_per_second=3000,
        links=(800, 2),
        topologies=("1x1", "2x2"),
        number=1,
        kinds=("TPU v9x",),
        source="a test",
        devices=2,
    )
    monkeypatch.setitem(CHIPS, "v9x", chip)
    target = parse_target("v9x-4")
    assert (target.topology, target.num_devices) == ("v9x:2x2", 8)
    assert target.usable_bytes == int(31.5 * 2**30) < chip.memory_bytes == 32 << 30
    assert chip_of_device("TPU v9x") is chip
    with pytest.raises(TargetError, match="valid: v9x-1, v9x-4"):
        parse_target("v9x-8")


def test_an_adapter_is_a_file():
    """Equinox's: what is stacked is what `partition` calls an array, the rest is the block's."""
    eqx = pytest.importorskip("equinox")

    class Stack(eqx.Module):
        blocks: eqx.Module
        remat: str = eqx.field(static=True)

        def __init__(self, make, num_blocks: int, *, remat: str, key):
            self.blocks = eqx.filter_vmap(make)(jax.random.split(key, num_blocks))
            self.remat = remat

        def __call__(self, x):
            arrays, rest = eqx.partition(self.blocks, eqx.is_array)
            block = lambda x, one: x + jnp.tanh(jax.vmap(eqx.combine(one, rest))(x))
            return jaxckpt.scan_blocks(block, arrays, x, remat=self.remat)

    make = lambda key: eqx.nn.Linear(WIDTH, WIDTH, key=key)
    x = jnp.ones([ROWS, WIDTH])
    stacks, losses, found = {}, {}, {}
    for plan in ("none", "log"):
        stacks[plan] = stack = Stack(make, NUM_BLOCKS, remat=plan, key=jax.random.key(0))
        loss = lambda stack: stack(x).sum()
        losses[plan], grads = eqx.filter_jit(eqx.filter_value_and_grad(loss))(stack)
        found[plan] = grads.blocks.weight
    assert found["log"].shape == (NUM_BLOCKS, WIDTH, WIDTH)
    assert losses["log"] == losses["none"]
    assert jnp.abs(found["log"] - found["none"]).max() <= 1e-6 * jnp.abs(found["none"]).max()
    # The twin: under `log` the blocks' products are run again.
    products = lambda plan: count_flops(
        jax.make_jaxpr(jax.grad(lambda x, stack=stacks[plan]: stack(x).sum()))(x)
    )
    assert products("log") > products("none")
    with pytest.raises(jaxckpt.PlanError, match="binomial:9 asks for 9 carries"):
        Stack(make, NUM_BLOCKS, remat="binomial:9", key=jax.random.key(0))(x)


def test_contributing_says_where_things_are():
    """Ten questions and more, each with a file that says in its first line what it is for."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    answers = re.findall(r"^\| .+\? \| `(.+)` \|$", text, re.MULTILINE)
    assert len(answers) >= 10
    for name in answers:
        assert ast.get_docstring(ast.parse((ROOT / name).read_text())), name
    for name in re.findall(r"`((?:jaxckpt|tests|experiments)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name


def test_every_row_names_a_function():
    named = [word.makes for word in words.SCHEDULES.values()]
    named += [word.saves for word in words.POLICIES.values()]
    assert all(callable(words.function_of(text)) for text in named if text is not None)
    assert [name for name, word in words.SCHEDULES.items() if word.makes is None] == [
        "none",
        "full",
        "auto",
    ]
