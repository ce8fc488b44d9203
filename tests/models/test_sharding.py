"""Where arrays lie: rules by path, what optimizers keep, kernels on each device's own part."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec

from experiments.config import ConfigError, OptimizerConfig, TrainConfig
from experiments.training.build import build
from experiments.training.mesh import abstract_state, make_mesh
from experiments.training.step import resolve_model
from jaxckpt.costs.flops import count_flops
from jaxckpt.models import TransformerConfig, resolve
from jaxckpt.models.mesh import MeshShape
from jaxckpt.models.sharding import Layout

MODEL = TransformerConfig(dtype="float32", attention="plain", tied_embeddings=False)
CONFIG = TrainConfig(model=MODEL, mesh="fsdp=4,tensor=2")


def specs(kind: str) -> dict[str, tuple]:
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(kind=kind))
    leaves = jax.tree_util.tree_leaves_with_path(abstract_state(config))
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.sharding.spec) for path, leaf in leaves}


def test_every_matrix_is_cut_over_both_axes():
    """One that no rule knows would be whole on every device, and nobody would see it."""
    for path, (shape, spec) in specs("adamw").items():
        matrix = path.endswith(("['kernel']", "['embedding']"))
        assert {"fsdp", "tensor"} <= set(spec) if matrix else set(spec) <= {None}, path
        if "layers" in path and matrix:
            assert spec[0] is None and len(shape) == 3, path


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd", "muon"])
def test_the_optimizers_state_follows_its_parameter(kind):
    found = specs(kind)
    params = {p: s for p, s in found.items() if p.startswith(".params")}
    kept = [p for p in found if "optimizer" in p and p.endswith("['kernel']")]
    assert len(kept) >= len([p for p in params if p.endswith("['kernel']")])
    for path in kept:
        tail = path[path.index("['layers']" if "layers" in path else "['lm_head']") :]
        assert found[path] == params[f".params{tail}"], path


def test_rows_and_columns_of_a_factored_optimizer_are_whole():
    rows = {p: s for p, s in specs("adafactor").items() if "v_row" in p or "v_col" in p}
    assert rows and all(set(spec) <= {None} for _, spec in rows.values())


def test_a_mesh_of_more_devices_than_there_are():
    count = jax.device_count()
    config = dataclasses.replace(CONFIG, mesh=f"fsdp={4 * count}", batch_size=16 * count)
    with pytest.raises(ConfigError, match=f"is of {4 * count} devices; this run has {count} dev"):
        make_mesh(config)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["none", "attention", "full"])
@pytest.mark.parametrize("mesh", ["fsdp=4", "data=2,tensor=2"])
def test_a_flash_kernel_is_run_on_each_devices_own_part(mesh, plan):
    """FLOPs are as on one device: the kernel's grid is cut, and its mask is still a constant."""
    model = dataclasses.replace(MODEL, attention="splash", head_dim=128, num_blocks=2)
    config = TrainConfig(model=model, batch_size=4, seq_len=2048, remat=plan)
    count = lambda step: count_flops(jax.make_jaxpr(step.fn)(*step.args))
    spread = build(dataclasses.replace(config, mesh=mesh), "v5e-4")
    assert count(spread) == count(build(config, "v5e-1"))
    assert "shard_map" in str(jax.make_jaxpr(spread.fn)(*spread.args))


def test_auto_is_the_flash_kernel_where_a_layout_runs_it():
    model = dataclasses.replace(MODEL, attention="auto", dtype="auto", head_dim=128)
    chosen = lambda **how: resolve(model, "v5e-4", seq_len=512, **how).config.attention
    assert (chosen(spread=True), chosen()) == ("splash", "plain")


def test_blocks_are_unrolled_on_one_gpu_alone():
    config = TrainConfig(model=MODEL, remat="attention")
    assert resolve_model(config, "h100")[0].unroll == MODEL.num_blocks
    assert resolve_model(dataclasses.replace(config, mesh="fsdp=8"), "h100-8")[0].unroll == 1


def test_a_mesh_is_known_by_its_sizes():
    spec = Layout(MeshShape(fsdp=2)).spec_of(("layers", "mlp", "down_proj", "kernel"), 3)
    assert spec == PartitionSpec(None, "tensor", "fsdp")
    assert hash(Layout(MeshShape(fsdp=2))) == hash(Layout(MeshShape.parse("fsdp=2")))
