"""What the tests of meshes compute, in a process that has eight devices; prints JSON.

`python -m tests.models.eight_devices CASES` with cases as `[[mesh, plan, bad rule?], ...]`.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.sharding import PartitionSpec

from experiments.config import TrainConfig
from experiments.training.checkpoints import Checkpoints
from experiments.training.mesh import abstract_state, make_mesh
from experiments.training.step import init_state, layout_of, make_loss
from jaxckpt.compiled.collectives import traffic
from jaxckpt.models import TransformerConfig, sharding

MODEL = TransformerConfig(
    **{"num_blocks": 4, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    **{"d_ff": 64, "vocab_size": 64, "dropout": 0.1, "dtype": "float32", "attention": "plain"},
)
BASE = TrainConfig(
    model=MODEL, batch_size=8, seq_len=16, loss_chunk_tokens=32, unroll=1, remat="none", pack=True
)


def batch():
    """Returns tokens and the ids of two documents a row."""
    tokens = np.random.default_rng(0).integers(0, 64, (8, 17), dtype=np.int32)
    return tokens, np.tile((np.arange(17) > 9).astype(np.int32), (8, 1))


def gradients(config, params, batch):
    """Returns `(loss, gradients)` and the compiled program."""
    loss = make_loss(config)
    step = lambda params, batch: jax.value_and_grad(loss)(params, batch, jax.random.key(3), 100)
    compiled = jax.jit(step).lower(params, batch).compile()
    return compiled(params, batch), compiled


def relative_error(got, want) -> float:
    """Returns the largest error of a leaf, by the leaf's largest value."""
    error = lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()
    return float(max(jax.tree.leaves(jax.tree.map(error, got, want))))


def case(params, want, mesh: str, plan: str, bad: bool):
    """Returns the error on a mesh, and the sizes of what is gathered."""
    rules = dict(sharding._RULES)
    if bad:
        # A natural mistake: the stack is cut between its blocks.
        bad_spec = lambda self, path, ndim: PartitionSpec("fsdp" if "layers" in path else None)
        good, sharding.Layout.spec_of = sharding.Layout.spec_of, bad_spec
    config = dataclasses.replace(BASE, mesh=mesh, remat=plan)
    layout, devices = layout_of(config), make_mesh(config)
    put = lambda tree, where: jax.tree.map(jax.device_put, tree, where)
    placed = put(params, layout.of_params(params, devices))
    tokens = jax.device_put(batch(), layout.of_batch(devices))
    got, compiled = gradients(config, placed, tokens)
    if bad:
        sharding.Layout.spec_of = good
    assert rules == sharding._RULES
    sent = [one for one in traffic(compiled.as_text(), 8).collectives if one.kind == "all-gather"]
    sizes = lambda one: [int(np.prod(s)) for dtype, s in one.shapes if dtype.startswith("f")]
    return {
        "error": relative_error(got, want),
        "outside": [size for one in sent if not one.loops for size in sizes(one)],
        "inside": [size for one in sent if one.loops for size in sizes(one)],
        "bytes": traffic(compiled.as_text(), 8).bytes,
    }


def moved(state) -> list[float]:
    """Returns how far a state is from itself after it moved: mesh, other mesh, one device."""
    config = lambda mesh: dataclasses.replace(BASE, mesh=mesh)
    found = []
    # Orbax goes on with its folders for a moment after it is closed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for step, (before, after) in enumerate(
            [("data=2,fsdp=4", "fsdp=2"), ("fsdp=2,tensor=2", None)]
        ):
            like = abstract_state(config(before), make_mesh(config(before)))
            state = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), state, like)
            checkpoints = Checkpoints(Path(folder) / str(step), keep=1)
            checkpoints.save(state._replace(step=state.step * 0 + step), {"config": {}})
            checkpoints.wait()
            there = abstract_state(config(after), make_mesh(config(after)))
            loaded = checkpoints.load(step, there)
            checkpoints.close()
            params, want = jax.tree.leaves(loaded.params), jax.tree.leaves(there.params)
            if after is not None:
                assert all(x.sharding == to.sharding for x, to in zip(params, want, strict=True))
            pairs = zip(params, jax.tree.leaves(state.params), strict=True)
            found.append(float(max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs)))
    return found


def main():
    """Runs the cases."""
    assert jax.device_count() == 8
    state = jax.jit(lambda: init_state(BASE))()
    params = state.params
    want, _ = gradients(BASE, params, batch())
    cases = json.loads(sys.argv[1])
    found = {"cases": [case(params, want, *one) for one in cases]}
    if len(sys.argv) > 2:
        found["moved"] = moved(state)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
