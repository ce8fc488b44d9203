"""The block that a step is explained by is the block that its stack runs."""

import dataclasses

import jax
import pytest

from experiments.config import TrainConfig
from experiments.training.build import abstract_block, build
from experiments.training.step import make_train_step
from jaxckpt.memory.built_step import stack_bytes
from jaxckpt.models.config import TransformerConfig
from jaxckpt.planner.places import Finder, places
from jaxckpt.plans import Policy
from jaxckpt.transforms import value_names
from jaxckpt.transforms.observers import observed

_SIZES = {"num_blocks": 4, "d_model": 16, "d_ff": 32, "num_heads": 2, "vocab_size": 64}
_ANY = (Policy(kind="names", names=("@cast.1",)),)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["none", "full", "full+dots"])
@pytest.mark.parametrize("unroll", [1, 4])
def test_untagged_values_are_counted_as_in_the_stack(plan, unroll):
    model = TransformerConfig(**_SIZES, dtype="bf16", attention="plain")
    config = TrainConfig(model=model, remat=plan, unroll=unroll, batch_size=2, seq_len=16)
    step = build(config, "local")
    finder = Finder()
    with observed(finder):
        jaxpr = jax.make_jaxpr(make_train_step(config))(*step.args)
    (place,) = places(finder.phases(jaxpr))
    stack = place.call.stack
    block, params_i, x, *consts = abstract_block(config, step.args[0].params)
    of_step = value_names.offered(stack.call, _ANY, stack.carry, stack.params_i, stack.consts)
    of_block = value_names.offered(block, _ANY, x, params_i, *consts)
    assert of_step.invented == of_block.invented
    assert "@cast.1" in of_block.invented


def test_a_plan_that_names_the_last_cast_of_an_unrolled_block_is_explained():
    """Parameters are cast in it, and before a loop's; the block's own casts have the same names."""
    model = TransformerConfig(**_SIZES, dtype="bf16", attention="plain")
    config = TrainConfig(model=model, remat="full", unroll=4, batch_size=2, seq_len=16)

    def names_of(config):
        block, params_i, x, *consts = abstract_block(config, build(config, "local").args[0].params)
        return value_names.offered(block, _ANY, x, params_i, *consts).invented

    names = names_of(config)
    assert names == names_of(dataclasses.replace(config, unroll=1))
    last = max(int(name[6:]) for name in names if name.startswith("@cast."))
    assert last > 10
    step = build(dataclasses.replace(config, remat=f"names:@cast.{last}"), "local")
    assert stack_bytes(step.plan, *step.block) > 0
