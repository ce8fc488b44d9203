"""Plans of a function's graph: their text, what runs under them, what is refused."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.costs.flops import count_flops
from jaxckpt.plans import Plan, PlanError
from jaxckpt.transforms.cuts import Opened
from jaxckpt.transforms.traced_block import trace_block
from tests.transforms.cases import relative_error

KEY = jax.random.key(0)
W = [jax.random.normal(jax.random.fold_in(KEY, n), (8, 8)) for n in range(4)]
X = jax.random.normal(KEY, (4, 8))
PRODUCT = 2 * 4 * 8 * 8


def unet(w, x, key):
    """Four products, a skip over the inner two, dropout, a complex value, a `jit` inside."""
    skip = jaxckpt.tag(jnp.tanh(x @ w[0]), "skip")
    keep = jax.random.bernoulli(key, 0.7, skip.shape)
    inner = jax.jit(lambda x, w: jnp.tanh(x @ w))
    low = inner(inner(jnp.where(keep, skip, 0), w[1]), w[2])
    waves = jnp.fft.ifft(jnp.fft.fft(low) * (1 + 0.5j)).real
    return jnp.sin((waves + skip) @ w[3])


def opened(fn=unet, x=X) -> Opened:
    block, _ = trace_block(lambda args, _: fn(*args), (W, x, KEY))
    return Opened.of(block.jaxpr)


def plan_of(*treatments: str, fn=unet, x=X) -> Plan:
    """Returns the plan of about equal segments with the given treatments."""
    found = opened(fn, x)
    size = found.num_steps // len(treatments)
    counts = [size] * (len(treatments) - 1)
    counts.append(found.num_steps - sum(counts))
    stages = (f"{count}x{text}" for count, text in zip(counts, treatments, strict=True))
    return Plan.parse(f"graph:{found.graph}/{'/'.join(stages)}")


def value_and_grads(remat, fn=unet):
    loss = lambda w, x: jaxckpt.checkpoint(fn, remat=remat)(w, x, KEY).sum()
    return jax.value_and_grad(loss, (0, 1))


TREATMENTS = [
    ("full",),
    ("none", "full"),
    ("full", "none"),
    ("full+dots", "full"),
    ("full+names:skip", "none", "full"),
    ("full",) * 5,
]


@pytest.mark.slow
@pytest.mark.parametrize("treatments", TREATMENTS)
@pytest.mark.parametrize("is_jitted", [True, False])
def test_gradients_are_those_of_the_function(treatments, is_jitted):
    compiled = jax.jit if is_jitted else lambda fn: fn
    found = compiled(value_and_grads(plan_of(*treatments)))(W, X)
    assert relative_error(found, jax.jit(value_and_grads("none"))(W, X)) < 1e-6


def products(remat, fn=unet) -> float:
    flops = count_flops(jax.make_jaxpr(value_and_grads(remat, fn))(W, X))
    return (flops - count_flops(jax.make_jaxpr(value_and_grads("none", fn))(W, X))) / PRODUCT


def deep(w, x, key):
    for weight in w:
        x = jnp.tanh(x @ weight)
    return x.sum()


def test_what_is_run_again():
    """The twin: a product is run again where its segment is `full` and reads its result."""
    assert products(plan_of("full", fn=deep), deep) == 4
    assert products(plan_of("none", "none", fn=deep), deep) == 0
    assert products(plan_of("full+names:@tanh.1", fn=deep), deep) == 3
    found = opened(deep)
    places = [n for n, e in enumerate(found.jaxpr.eqns, 1) if e.primitive.name == "tanh"]
    half = places[1]
    for one, two, want in [("full", "none", 2), ("none", "full", 2), ("full", "names:@tanh.*", 2)]:
        plan = Plan.parse(f"graph:{found.graph}/{half}x{one}/{two}")
        # A kept input of a segment is not made again.
        assert products(plan, deep) == want, (one, two)


@pytest.mark.slow
def test_a_plan_is_text_and_the_same_in_another_process():
    plan = plan_of("full+names:@dot.1", "none", "full+dots")
    assert Plan.parse(str(plan)) == plan and Plan.parse(json.loads(json.dumps(str(plan)))) == plan
    assert hash(Plan.parse(str(plan))) == hash(plan) and not set(str(plan)) & set(" '\"$&;()*")
    code = (
        "import jax, tests.transforms.test_graph_plans as t\n"
        f"print(jax.make_jaxpr(t.value_and_grads({str(plan)!r}))(t.W, t.X))"
    )

    def text_under(seed: str) -> str:
        command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONHASHSEED": seed}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return _shapes(run.stdout)

    assert text_under("1") == text_under("2")


def _shapes(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if " at 0x" not in line)


def test_plans_of_other_functions_are_refused():
    plan = plan_of("full", "none")
    with pytest.raises(PlanError, match=r"it has \d+ steps, the plan \d+"):
        jax.make_jaxpr(value_and_grads(plan, deep))(W, X)
    with pytest.raises(PlanError, match="the steps are the same, but shapes or dtypes differ"):
        jax.make_jaxpr(value_and_grads(plan))(W, jnp.ones((6, 8)))
    sine = lambda w, x, key: unet(w, x, key)[:, ::-1]
    cosine = lambda w, x, key: unet(w, x, key).astype(jnp.float16)
    with pytest.raises(PlanError, match="its steps are others"):
        jax.make_jaxpr(value_and_grads(plan_of("full", fn=sine), cosine))(W, X)
    with pytest.raises(PlanError, match="is for one function"):
        jaxckpt.scan_blocks(lambda x, w: x @ w, jnp.ones((3, 8, 8)), X, remat=plan)
    with pytest.raises(PlanError, match=r"segment 1: .*names:skp matches no tag .*'skip'"):
        jax.make_jaxpr(value_and_grads(plan_of("names:skp", "none")))(W, X)


@pytest.mark.parametrize(
    "text, message",
    [
        ("graph:12/3xfull", "two digests of six"),
        ("graph:3f9a01-c4427e", "at least one stage"),
        ("graph:3f9a01-c4427e/3xsqrt", "cannot be a segment of a function"),
        ("graph:3f9a01-c4427e/2xnone/3xsqrt/none", r"/2xnone/>>3xsqrt<</none': .* be a segment"),
        ("graph:aa-bb/3xbinomial:2", "graph:aa-bb/>>3xbinomial:2<<"),
        ("grph:3f9a01-c4427e/3xfull", r">>grph:.*<</3xfull': .*\(did you mean 'graph:'\?\)"),
        ("graph:3f9a01-c4427e/offload:carry", "cannot be a segment of a function"),
        ("graph:3f9a01-c4427e/3xful", "did you mean 'full'"),
        ("graph:3f9a01-c4427e/full/none", "needs a count"),
        ("full/graph:3f9a01-c4427e", "'graph' is not a schedule"),
    ],
)
def test_texts_that_are_no_plan(text, message):
    with pytest.raises(PlanError, match=message):
        Plan.parse(text)
