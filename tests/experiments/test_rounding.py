"""Parameters in bfloat16: rounded by chance, the same in every run, a block as in its stack."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.config import ConfigError, OptimizerConfig, TrainConfig
from experiments.training.rounding import stochastically_rounded
from experiments.training.step import init_state, make_train_step, resolve_model, state_bytes
from jaxckpt.models import TransformerConfig
from jaxckpt.transforms.optimizer_rows import OptimizerRows

MODEL = TransformerConfig(
    num_blocks=4, d_model=32, num_heads=2, num_kv_heads=1, head_dim=16, d_ff=64
)
CONFIG = TrainConfig(
    model=MODEL, steps=6, batch_size=2, seq_len=16, remat="full", param_dtype="bfloat16"
)


def stepped(optimizer, params, grads, steps):
    """Returns the parameters after equal steps."""

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0])()


def test_small_updates_are_not_lost():
    """The twin: rounded to the nearest, a weight of 1 never moves by 1e-4."""
    params = {"w": jnp.ones([4, 256], jnp.bfloat16)}
    grads = jax.tree.map(lambda x: jnp.full(x.shape, -1e-4), params)
    rounded, _ = stepped(stochastically_rounded(optax.sgd(1.0), 0), params, grads, 100)
    assert rounded["w"].dtype == jnp.bfloat16
    assert abs(rounded["w"].astype(jnp.float32).mean() - 1.01) < 5e-4
    nearest, _ = stepped(optax.sgd(1.0), params, grads, 100)
    assert (nearest["w"] == 1).all()


def test_bits_follow_seed_step_parameter_and_row():
    params = {name: jnp.ones([4, 256], jnp.bfloat16) for name in "ab"}
    grads = jax.tree.map(lambda x: jnp.full(x.shape, -3e-3), params)
    one, state = stepped(stochastically_rounded(optax.sgd(1.0), 0), params, grads, 1)
    again, _ = stepped(stochastically_rounded(optax.sgd(1.0), 0), params, grads, 1)
    other, _ = stepped(stochastically_rounded(optax.sgd(1.0), 1), params, grads, 1)
    assert (one["a"] == again["a"]).all() and (one["a"] != other["a"]).any()
    assert (one["a"] != one["b"]).any() and (one["a"][0] != one["a"][1]).any()
    optimizer = stochastically_rounded(optax.sgd(1.0), 0)
    updates, _ = jax.jit(optimizer.update)(grads, state, params)
    assert (optax.apply_updates(params, updates)["a"] != one["a"]).any()
    # A block alone, as the backward pass updates it.
    cut = OptimizerRows.of(optimizer, params, (0, 1))
    leaves = lambda tree, i: [leaf[i : i + 1] for leaf in jax.tree.leaves(tree)]
    fresh = jax.tree.leaves(optimizer.init(params))
    rows = [fresh[place][2:3] for place in cut.rows]
    (a, _), _ = jax.jit(cut.update_block)(leaves(grads, 2), leaves(params, 2), rows, fresh)
    assert (a == one["a"][2:3]).all()


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True])
def test_a_run_learns_and_its_state_is_small(inside):
    optimizer = OptimizerConfig(moment_dtype="bfloat16", warmup_steps=0, learning_rate=1e-2)
    config = dataclasses.replace(CONFIG, optimizer=optimizer, update_in_backward=inside, steps=30)
    config, _ = resolve_model(config)
    state = jax.jit(lambda: init_state(config))()
    step, losses = jax.jit(make_train_step(config), donate_argnums=0), []
    tokens = (np.arange(2)[:, None] * 3 + np.arange(17)) % 8
    for _ in range(30):
        state, metrics = step(state, tokens)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.params["layers"]))
    assert state.params["embed_tokens"]["embedding"].dtype == jnp.float32
    wide = jax.eval_shape(lambda: init_state(dataclasses.replace(config, param_dtype="float32")))
    assert state_bytes(state)[0] < 3.0 < state_bytes(wide)[0]
    assert 5.9 < state_bytes(state)[1] < 6.5


@pytest.mark.slow
def test_parts_of_a_batch_are_summed_in_float32():
    config, _ = resolve_model(dataclasses.replace(CONFIG, accumulate=2))
    state = jax.eval_shape(lambda: init_state(config))
    tokens = jax.ShapeDtypeStruct((2, 17), "int32")
    text = str(jax.make_jaxpr(make_train_step(config))(state, tokens))
    assert "f32[4,32,64]" in text
    made, _ = jax.eval_shape(make_train_step(config), state, tokens)
    assert jax.tree.map(lambda x: x.dtype, made) == jax.tree.map(lambda x: x.dtype, state)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: dataclasses.replace(CONFIG, mesh="fsdp=2"), "is for one device"),
        (lambda: dataclasses.replace(CONFIG, param_dtype="bf16"), "param_dtype is 'bf16'; valid"),
        (lambda: OptimizerConfig(moment_dtype="int8"), "moment_dtype is 'int8'; valid"),
        (
            lambda: OptimizerConfig(kind="adafactor", moment_dtype="bfloat16"),
            "adafactor has none",
        ),
    ],
)
def test_bad_settings(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
