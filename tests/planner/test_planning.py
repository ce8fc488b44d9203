"""Planning alone, nothing compiled: how much work it is, and that every process plans the same."""

import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from jaxckpt.costs.roofline import rates_of
from jaxckpt.models import Transformer, TransformerConfig
from jaxckpt.planner.inside_block import Graph, proposals
from jaxckpt.planner.places import places
from jaxckpt.planner.problem import Problem
from jaxckpt.planner.stacks import Stack
from jaxckpt.planner.steps import Steps
from jaxckpt.plans import Plan
from jaxckpt.targets.target import parse_target
from tests.work import calls_of

TARGET = parse_target("v5e-1")
RATES = rates_of(TARGET)
FULL_BYTES, RESIDUAL_BYTES = 5 << 30, 336 << 20
pytestmark = pytest.mark.heavy


def steps(num_blocks: int) -> Steps:
    """Returns the steps of a Qwen3-0.6B shape; what a compiler would say is made up."""

    def step_for(plan):
        config = TransformerConfig(
            vocab_size=64,
            num_blocks=num_blocks,
            d_model=1024,
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
            d_ff=3072,
            dtype="bf16",
            attention="plain",
        )
        model = Transformer(config, remat=plan)
        tokens = jax.ShapeDtypeStruct((8, 1024), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        loss = lambda params, tokens: model.apply(params, tokens).astype(jnp.float32).sum()
        return jax.grad(loss), (params, tokens)

    def report_of(plan):
        share = {"full": 0, "none": 1}.get(str(plan), 0.5)
        return types.SimpleNamespace(
            peak_bytes=FULL_BYTES + int(share * num_blocks * RESIDUAL_BYTES), num_devices=1
        )

    return Steps(step_for, TARGET, report_of)


def ladder(num_blocks: int) -> list[str]:
    return [str(r.plan) for r in Problem.of(steps(num_blocks), num_blocks, RATES, None).ladder()]


def test_the_work_of_planning_grows_with_the_blocks():
    _, forty = calls_of(lambda: ladder(40))
    plans, eighty = calls_of(lambda: ladder(80))
    assert eighty < 3 * forty and eighty < 100_000_000
    assert plans[0].startswith("attention+names:") and len(plans) > 20


def test_the_program_of_a_transformer_block_is_little_work():
    (place,) = places(steps(28).trace(Plan.parse("full")).phases)
    stack = place.call.stack
    assert isinstance(stack, Stack)
    found, calls = calls_of(lambda: list(proposals(Graph.of(stack, RATES))))
    assert calls < 2_000_000  # 250,000
    assert len(found) >= 6


def test_every_process_plans_the_same():
    code = "from tests.planner import test_planning as t; print(t.ladder(12))"
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[-1]
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] == str(ladder(12))
    assert "@" in found[0]
