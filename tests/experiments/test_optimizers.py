"""The optimizers: each learns, weighs what it should, is saved and donated, and has its flags."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import main
from experiments.config import ConfigError, OptimizerConfig, TrainConfig, load_toml
from experiments.training.checkpoints import Checkpoints, about_run
from experiments.training.optimizers import make_optimizer
from experiments.training.step import init_state, make_train_step
from jaxckpt.models import TransformerConfig

pytestmark = pytest.mark.slow

MODEL = TransformerConfig(
    num_blocks=3, d_model=32, num_heads=2, num_kv_heads=1, head_dim=16, d_ff=64
)
DEFAULTS = TrainConfig()
RATES = {"adamw": 1e-2, "adafactor": 0.1, "lion": 3e-3, "sgd": 0.3, "muon": 1e-2}


def config(kind: str, **changes) -> TrainConfig:
    optimizer = OptimizerConfig(kind=kind, learning_rate=RATES[kind], warmup_steps=2)
    given = {"model": MODEL, "steps": 40, "batch_size": 4, "seq_len": 32, "remat": "full"}
    return TrainConfig(**given | {"optimizer": optimizer} | changes)


def tokens(seed: int = 0):
    """Returns a batch of eight tokens that follow each other in a circle."""
    return (np.random.default_rng(seed).integers(0, 8, [4, 1]) + np.arange(33)) % 8


def heavy(*kinds: str):
    return [pytest.param(kind, marks=pytest.mark.heavy) for kind in kinds]


@pytest.mark.parametrize("kind", ["adamw", "muon", *heavy("adafactor", "lion", "sgd")])
def test_the_loss_falls_by_half(kind):
    state = jax.jit(lambda: init_state(config(kind)))()
    step, losses = jax.jit(make_train_step(config(kind)), donate_argnums=0), []
    for number in range(40):
        state, metrics = step(state, tokens(number % 4))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0], losses[::8]
    assert int(state.skipped) == 0


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_bytes_of_the_state():
    """In parameters: two moments, one, or a row and a column of each matrix."""
    model = dataclasses.replace(MODEL, d_model=256, d_ff=512, head_dim=128)
    state = lambda kind: jax.eval_shape(lambda: init_state(config(kind, model=model)))
    params = nbytes(state("adamw").params)
    ratio = {kind: nbytes(state(kind).optimizer) / params for kind in RATES}
    assert ratio["adamw"] == pytest.approx(2, rel=1e-3)
    assert ratio["lion"] == pytest.approx(1, rel=1e-3)
    assert ratio["sgd"] == pytest.approx(1, rel=1e-3)
    layers = nbytes(state("muon").params["layers"]) / params
    assert ratio["muon"] == pytest.approx(layers + 2 * (1 - layers), rel=1e-2)
    assert ratio["adafactor"] < 0.03


@pytest.mark.parametrize("kind", ["adafactor", *heavy("adamw", "lion", "muon", "sgd")])
def test_the_state_is_donated(kind):
    state = jax.eval_shape(lambda: init_state(config(kind)))
    step = jax.jit(make_train_step(config(kind)), donate_argnums=0)
    batch = jax.ShapeDtypeStruct((4, 33), jnp.int32)
    made = jax.eval_shape(make_train_step(config(kind)), state, batch)[0]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    memory = step.trace(state, batch).lower().compile().memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes(state)


@pytest.mark.parametrize("kind", ["muon", *heavy("adafactor", "lion", "sgd")])
def test_the_state_survives_a_checkpoint(kind, tmp_path):
    run = config(kind)
    state = jax.jit(lambda: init_state(run))()
    state, _ = jax.jit(make_train_step(run))(state, tokens())
    with contextlib.closing(Checkpoints(tmp_path, 1)) as checkpoints:
        checkpoints.save(state, about_run(run, "0" * 64, 1))
        checkpoints.wait()
        loaded = checkpoints.load(1, jax.eval_shape(lambda: init_state(run)))
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)


def test_muon_makes_each_blocks_matrices_orthogonal():
    optimizer = make_optimizer(
        OptimizerConfig(kind="muon", warmup_steps=0, weight_decay=0.0, clip_norm=1e9), 10
    )
    key = jax.random.key(0)
    kernel = jax.random.normal(key, (3, 32, 64)) * jnp.array([1, 10, 100])[:, None, None]
    params = {"layers": {"up": {"kernel": kernel}}, "lm_head": {"kernel": kernel[0]}}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    stretch = 3e-3 * 0.2 * np.sqrt(64)
    singular = jnp.linalg.svd(updates["layers"]["up"]["kernel"], compute_uv=False) / stretch
    assert singular.min() > 0.5 and singular.max() < 1.5
    # What is no hidden matrix goes to Adam, whose first update is the gradient's sign.
    np.testing.assert_allclose(np.abs(updates["lm_head"]["kernel"]), 3e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["muon", *heavy("adafactor", "adamw", "lion", "sgd")])
def test_decay_is_times_the_learning_rate_and_spares_the_scales(kind):
    optimizer = make_optimizer(OptimizerConfig(kind=kind, warmup_steps=0, weight_decay=0.1), 10)
    params = jax.jit(lambda: init_state(config(kind)))().params
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    up, scale = updates["layers"]["mlp"]["up_proj"]["kernel"], updates["norm"]["scale"]
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_allclose(up, -0.1 * 3e-3 * kernel, rtol=1e-5, atol=1e-9)
    assert not np.abs(scale).any()


def parse(*flags) -> OptimizerConfig:
    found = []

    def train(settings: TrainConfig = DEFAULTS, *, config: str = ""):
        found.append(settings.optimizer)

    main(train, flags)
    return found[0]


def test_flags_and_toml(tmp_path):
    assert parse("--optimizer=lion").betas == (0.9, 0.99)
    assert parse("--optimizer", "muon", "--beta1", "0.8").betas == (0.8, 0.95)
    assert parse().kind == "adamw" and parse().betas == (0.9, 0.95)
    path = tmp_path / "x.toml"
    path.write_text("[optimizer]\nkind = 'sgd'\nbeta1 = 0.5\n")
    assert load_toml(path) == {"optimizer": "sgd", "beta1": 0.5}
    assert parse(f"--config={path}") == OptimizerConfig(kind="sgd", beta1=0.5)
    assert parse(f"--config={path}", "--optimizer=lion").betas == (0.5, 0.99)
    path.write_text("optimizer = 'sgd'")
    with pytest.raises(ConfigError, match=r"optimizer is a table, written \[optimizer\]"):
        load_toml(path)
    path.write_text("[optimizer]\nbeta1 = 'x'\n")
    with pytest.raises(ConfigError, match=r"beta1 = 'x' is str, where float is needed"):
        load_toml(path)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--optimizer=lino"], 'Did you mean "lion"?'),
        (["--optimizer=sgd", "--beta2=0.9"], "sgd has none; these have one: adamw, lion, muon"),
        (["--optimizer=adafactor", "--beta1=0.9"], "it is of: adamw, lion, sgd, muon"),
        (["--beta1=1"], "beta1 is a decay in [0, 1), not 1.0"),
        (["--loss-chunk-tokens=100"], "loss_chunk_tokens 100 does not cut 16 rows of 128"),
        (["--attention=flash"], "Choose from"),
    ],
)
def test_refused_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_an_unknown_kind():
    with pytest.raises(ConfigError, match=r"optimizer is 'adam'; valid: adamw, .* mean 'adamw'\?"):
        OptimizerConfig(kind="adam")
