"""`--update-in-backward`: the separate step's weights, resumed on and off, refused by name."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.config import ConfigError, OptimizerConfig, TrainConfig
from experiments.training.checkpoints import Checkpoints, about_run, check_same_run
from experiments.training.optimizers import make_optimizer
from experiments.training.step import init_state, make_train_step, resolve_model
from jaxckpt.models import TransformerConfig
from jaxckpt.transforms.optimizer_rows import check_blockwise
from tests.transforms.cases import relative_error

MODEL = TransformerConfig(
    num_blocks=4, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32, dropout=0.1
)
OPTIMIZER = OptimizerConfig(warmup_steps=0, clip_norm=1e9)
CONFIG = TrainConfig(model=MODEL, optimizer=OPTIMIZER, steps=6, batch_size=2, seq_len=16)
INSIDE = dataclasses.replace(CONFIG, update_in_backward=True)


def tokens(seed: int = 1):
    return np.random.default_rng(seed).integers(0, 256, [2, 17])


def after(config: TrainConfig, steps: int = 3):
    config, _ = resolve_model(config)
    state = jax.jit(lambda: init_state(config))()
    step = jax.jit(make_train_step(config))
    for number in range(steps):
        state, metrics = step(state, tokens(number))
    return state, metrics


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["full", pytest.param("2xnone/log", marks=pytest.mark.heavy)])
def test_weights_are_those_of_the_separate_step(plan):
    one, metrics = after(dataclasses.replace(CONFIG, remat=plan))
    other, found = after(dataclasses.replace(INSIDE, remat=plan))
    assert relative_error(found, metrics) < 1e-5
    for name in ("params", "optimizer"):
        assert relative_error(getattr(other, name), getattr(one, name)) < 1e-4
    assert abs(other.gradient_norm - metrics["gradient_norm"]) < 1e-5


@pytest.mark.slow
def test_gradients_are_clipped_by_the_last_step():
    """The twin: with no clipping in the first step, a small norm first changes the second."""
    clip = dataclasses.replace(OPTIMIZER, clip_norm=1e-3, kind="sgd", learning_rate=1.0)
    free = dataclasses.replace(clip, clip_norm=1e9)
    first = [after(dataclasses.replace(INSIDE, optimizer=one), 1)[0] for one in (clip, free)]
    assert relative_error(first[0].params, first[1].params) == 0
    second = [after(dataclasses.replace(INSIDE, optimizer=one), 2)[0] for one in (clip, free)]
    assert relative_error(second[0].params, second[1].params) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "adafactor", "lion", "sgd", "muon"])
def test_every_optimizer_is_of_one_block(kind):
    """So `check=False` in the step hides nothing; with clipping, each is refused."""
    params = jax.eval_shape(lambda: init_state(resolve_model(CONFIG)[0])).params
    leaves = jax.tree_util.tree_leaves_with_path(params)
    places = [n for n, (path, _) in enumerate(leaves) if "layers" in str(path[0])]
    optimizer = OptimizerConfig(kind=kind)
    check_blockwise(make_optimizer(optimizer, 10, clips=False), params, places)
    with pytest.raises(ValueError, match="clipping by the global norm"):
        check_blockwise(make_optimizer(optimizer, 10), params, places)


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_or_without(tmp_path):
    for number, (first, second) in enumerate([(CONFIG, INSIDE), (INSIDE, CONFIG)]):
        first, second = resolve_model(first)[0], resolve_model(second)[0]
        state, _ = after(first, 1)
        checkpoints = Checkpoints(tmp_path / str(number), keep=1)
        about = about_run(first, "0" * 64, 1)
        checkpoints.save(state, about)
        checkpoints.wait()
        like = jax.eval_shape(lambda config=second: init_state(config))
        found = checkpoints.load(1, like)
        assert (found.gradient_norm is None) == (second is not INSIDE and number == 1)
        assert relative_error(found.params, state.params) == 0
        lines = check_same_run(second, "0" * 64, about)
        assert any("the optimizer's step is" in line for line in lines)
        jax.jit(make_train_step(second))(found, tokens())
        checkpoints.close()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"accumulate": 2}, "after the last microbatch"),
        ({"mesh": "fsdp=2"}, "is for one device"),
        ({"model": dataclasses.replace(MODEL, dtype="float16")}, "as float16 needs"),
    ],
)
def test_what_it_cannot_do_is_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(INSIDE, **changes)


def test_no_trained_block_is_refused():
    config, _ = resolve_model(dataclasses.replace(INSIDE, trainable=("norm/*",)))
    state = jax.eval_shape(lambda: init_state(config))
    with pytest.raises(ConfigError, match="names no parameter of layers/"):
        jax.eval_shape(make_train_step(config), state, tokens())
