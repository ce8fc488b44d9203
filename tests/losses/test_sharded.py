"""Eight devices: right gradients whatever is sharded, and what is sent between them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("sharded_losses")

# Prints, for each case, the largest error against one device and the collectives it compiles to.
PROGRAM = '''
import json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxckpt.losses import linear_cross_entropy, plain_linear_cross_entropy
from jaxckpt.losses.placement import Placement

assert jax.device_count() == 8
auto, explicit = (jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
                  for kind in (AxisType.Auto, AxisType.Explicit))
B, S, D, V = 8, 16, 32, 512
keys = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(keys[0], (B, S, D))
w = jax.random.normal(keys[1], (D, V))
targets = jax.random.randint(keys[2], (B, S), 0, V).at[0].set(5)

def grads(loss, **options):
    return jax.value_and_grad(lambda x, w, t: loss(x, w, t, ignore_index=5, **options), (0, 1))

want = jax.jit(grads(plain_linear_cross_entropy))(x, w, targets)

def collectives(text):
    """Returns the shapes that are sent, in loops and outside of them."""
    bodies = set(re.findall(r"body=%?([\\w.-]+)", text))
    found, name = {"loop": [], "once": []}, None
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\\w.-]+) \\(", line)
        name = header[1] if header else name
        sent = re.search(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|"
                         r"collective-permute)(-start)?\\(", line)
        if sent:
            shapes = [shape for shape in re.findall(r"\\[([\\d,]*)\\]", sent[1])]
            where = "loop" if name in bodies else "once"
            found[where] += [[int(n) for n in s.split(",") if n] for s in shapes]
    return found

def case(tokens, weights, shape=(B, S), mesh=auto, **options):
    put = lambda y, spec: jax.device_put(y, NamedSharding(mesh, spec))
    args = (put(x.reshape(*shape, D), tokens), put(w, weights),
            put(targets.reshape(shape), tokens))
    fn = jax.jit(grads(linear_cross_entropy, chunk_tokens=32, **options))
    loss, (dx, dw) = fn(*args)
    got = (loss, (dx.reshape(x.shape), dw))
    error = lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max())
    return {"error": max(jax.tree.leaves(jax.tree.map(error, got, want))),
            "x_sharding": str(dx.sharding.spec), "w_sharding": str(dw.sharding.spec),
            **collectives(fn.lower(*args).compile().as_text())}

data, model = P("data"), P(None, "model")
spread = dict(shards="data", rows="model", vocabulary=("model",))
print(json.dumps({
    "tokens": case(data, P()),
    "tokens, shards": case(data, P(), token_shards=4),
    "vocabulary": case(P(), model),
    "both": case(data, model),
    "both, shards": case(data, model, token_shards=4),
    "width": case(data, P("data"), token_shards=4),
    "flat": case(data, P(), (B * S,)),
    "flat, shards": case(data, P(), (B * S,), token_shards=4),
    "sequence, as an axis": case(P(None, "data"), P(), (B, 4, S // 4)),
    "placement": case(data, P(), placement=Placement(mesh=auto, **spread)),
    "explicit: tokens": case(data, P(), mesh=explicit),
    "explicit: tokens, shards": case(data, P(), mesh=explicit, token_shards=4),
    "explicit: vocabulary": case(P(), model, mesh=explicit),
    "explicit: both, shards": case(data, model, mesh=explicit, token_shards=4),
    "explicit: width": case(data, P("data"), mesh=explicit),
    "explicit: placement": case(data, P(), mesh=explicit,
                                placement=Placement(mesh=explicit, **spread)),
}))
'''


@pytest.fixture(scope="module")
def cases():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_gradients_are_those_of_one_device(cases):
    for name, case in cases.items():
        assert case["error"] <= 1e-6, name


@pytest.mark.slow
def test_shards_sum_the_weights_gradient_once(cases):
    """The twin is the same call without `token_shards`: a gradient of w is sent every chunk."""
    for name in ("tokens, shards", "flat, shards", "explicit: tokens, shards"):
        assert cases[name]["loop"] == [], name
        assert [32, 512] in cases[name]["once"], name
    assert [32, 512] in cases["tokens"]["loop"]
    assert [32, 256] in cases["both"]["loop"]
    assert [32, 256] not in cases["both, shards"]["loop"]
    assert [32, 256] in cases["both, shards"]["once"]


def size(shape) -> int:
    count = 1
    for axis in shape:
        count *= axis
    return count


@pytest.mark.slow
def test_a_sharded_vocabulary_sends_no_logits(cases):
    """A chunk of 32 tokens has 32 x 512 logits; its gradient of x, 32 x 32, is the most sent."""
    sent = [size(shape) for shape in cases["vocabulary"]["loop"]]
    assert max(sent) == 32 * 32
    assert sum(sent) <= 32 * 32 + 3 * 32 + 1


@pytest.mark.slow
def test_gradients_keep_the_shardings(cases):
    for kind in ("", "explicit: "):
        assert "data" in cases[kind + "both, shards"]["x_sharding"]
        assert "model" in cases[kind + "both, shards"]["w_sharding"]
    assert "data" in cases["explicit: width"]["w_sharding"]


@pytest.mark.slow
def test_a_sharded_sequence_as_an_axis_is_not_gathered(cases):
    assert all(size(shape) <= 32 * 512 for shape in cases["sequence, as an axis"]["loop"])
    assert [128, 32] in cases["flat"]["once"] + cases["flat"]["loop"]  # what it would be
