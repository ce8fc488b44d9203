"""Attention kernels: one result, what the policy `attention` keeps of each, errors in one line."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.absent import launch
from jaxckpt.absent.jobs import Entry, measure_entry
from jaxckpt.costs.flops import count_flops
from jaxckpt.models import causal_attention
from jaxckpt.targets.target import parse_target
from tests.memory.kernels import trace_cudnn
from tests.models import steps
from tests.transforms.cases import relative_error

BATCH, SIZE, HEADS, KV_HEADS, HEAD_DIM = 2, 256, 4, 2, 16


def inputs(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    shapes = [(BATCH, SIZE, number, HEAD_DIM) for number in heads]
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


# Two documents in the first row, three in the second.
SEGMENT_IDS = jnp.array([[0] * 100 + [1] * 156, [5] * 30 + [2] * 126 + [3] * 100])


def reference(q, k, v, segment_ids=None):
    """Attention by JAX's own function, all scores at once."""
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="xla")


def run(attend, *args):
    loss = lambda *qkv: jnp.sin(attend(*qkv, *args)).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*inputs())


@pytest.fixture
def interpreted(monkeypatch):
    """Lets the splash kernel run on a CPU."""
    package = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention")
    make = functools.partial(package.make_splash_mha, interpret=True)
    monkeypatch.setattr(package, "make_splash_mha", make)


@pytest.mark.slow
@pytest.mark.parametrize("segment_ids", [None, SEGMENT_IDS], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", ["plain", "chunked", "splash"])
def test_values_and_gradients_are_those_of_jax(kind, segment_ids, interpreted):
    attend = functools.partial(causal_attention, kind=kind)
    args = () if segment_ids is None else (segment_ids,)
    want = run(reference, *args)
    assert relative_error(run(attend, *args), want) < 1e-5
    other = () if segment_ids is not None else (SEGMENT_IDS,)
    assert relative_error(run(attend, *other), want) > 1e-2, "documents matter"


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 5, 128, 200])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_last_chunk_may_be_shorter(size, is_packed):
    qkv = [x[:, :size] for x in inputs()]
    ids = SEGMENT_IDS[:, :size] if is_packed else None

    def grads(attend, *args):
        return jax.grad(lambda *qkv: jnp.sin(attend(*qkv, *args)).sum(), (0, 1, 2))(*qkv)

    found = grads(functools.partial(causal_attention, kind="chunked"), ids)
    assert relative_error(found, grads(reference, ids)) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_chunks_hold_fewer_scores(dtype):
    """Of 512 queries 128 at a time."""
    shape = jax.ShapeDtypeStruct((1, 512, 8, 16), dtype)

    def temp_bytes(kind):
        loss = lambda *qkv: causal_attention(*qkv, kind=kind).astype("float32").sum()
        return jaxckpt.measure(jax.grad(loss, (0, 1, 2)), shape, shape, shape).temp_bytes

    assert temp_bytes("chunked") < 0.4 * temp_bytes("plain")


FORWARD = {"splash": r'kernel_name = "splash_mha_fwd', "cudnn": r"@__cudnn\$fmha\w*Softmax\("}
PLATFORM = {"splash": "tpu", "cudnn": "cuda"}
KERNELS = {"full": 2, "attention": 1, "names:q,k,v+attention": 1, "names:q,k,v": 2, "none": 1}


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("plan", KERNELS)
@pytest.mark.parametrize("kind", FORWARD)
def test_forward_kernels_in_a_lowered_step(kind, plan, packed, monkeypatch):
    trace_cudnn(monkeypatch)
    step, args, _ = steps.gradients(plan, packed, dtype="bf16", attention=kind)
    text = jax.jit(step).trace(*args).lower(lowering_platforms=(PLATFORM[kind],)).as_text()
    assert len(re.findall(FORWARD[kind], text)) == KERNELS[plan]


def test_plain_products_that_the_policy_saves():
    def flops(plan):
        step, args, _ = steps.gradients(plan, dtype="f32", attention="plain")
        return count_flops(jax.make_jaxpr(step)(*args))

    config, (batch, size) = steps.config(), steps.TOKENS
    product = 2 * batch * config.num_heads * (size - 1) ** 2 * config.head_dim
    # Scores and their product with the values; the output's projection reads what is kept.
    assert flops("full") - flops("attention") == 2 * config.num_blocks * product


def kept_bytes(kind: str, plan: str) -> int:
    """Returns what a stack of attention blocks hands to its backward pass, besides its inputs."""
    q, k, v = inputs("bfloat16")
    block = lambda q, scale: causal_attention(q * scale, k, v, kind=kind)
    run = lambda q: jaxckpt.scan_blocks(block, jnp.ones(3, q.dtype), q, remat=plan)
    found = jax.eval_shape(lambda q: jax.vjp(run, q)[1], q)
    stacked = [leaf for leaf in jax.tree.leaves(found) if leaf.shape[:2] == (3, BATCH)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in stacked)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "chunked", "splash", "cudnn"])
def test_the_policy_keeps_the_output_and_the_statistics_alone(kind, monkeypatch):
    trace_cudnn(monkeypatch)
    output = 2 * BATCH * SIZE * HEADS * HEAD_DIM
    statistics = 4 * BATCH * HEADS * SIZE
    carries = 3 * output
    assert kept_bytes(kind, "full") == carries
    assert kept_bytes(kind, "attention") == carries + 3 * (output + statistics)


ERRORS = [
    ("cudnn", "float32", {}, "'cudnn' takes bfloat16 and float16, not float32; 'plain' takes any"),
    ("cudnn", "bfloat16", {"head_dim": 20}, "a multiple of 8, up to 128, not 20"),
    ("cudnn", "bfloat16", {"head_dim": 136}, "a multiple of 8, up to 128, not 136"),
    ("splash", "float32", {"size": 200}, "a seq_len that is a multiple of 128, not 200"),
    ("splash", "float16", {}, "'splash' takes bfloat16 and float32, not float16"),
    ("slash", "float32", {}, r"attention is 'slash'; valid: .* \(did you mean 'splash'\?\)"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype, sizes, message", ERRORS)
def test_what_a_kernel_does_not_take(kind, dtype, sizes, message):
    shape = (1, sizes.get("size", 256), 2, sizes.get("head_dim", 16))
    x = jnp.zeros(shape, dtype)
    with pytest.raises(ValueError, match=message) as error:
        causal_attention(x, x, x, kind=kind)
    assert "\n" not in str(error.value)
    assert causal_attention(x, x, x, kind="plain").shape == shape


def test_segment_ids_that_do_not_fit():
    q, k, v = inputs()
    with pytest.raises(
        ValueError, match=r"segment_ids are int32\[2, 9\]; valid: integers \[2, 256"
    ):
        causal_attention(q, k, v, jnp.zeros((2, 9), jnp.int32))
    with pytest.raises(ValueError, match=r"segment_ids are float32\[2, 256\]; valid: integers"):
        causal_attention(q, k, v, jnp.zeros((2, 256)))


def test_no_cudnn_is_one_line(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", refuse)
    x = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"this process has none \(cuDNN is not detected\.\); use"):
        causal_attention(x, x, x, kind="cudnn")


def test_auto_on_a_cpu_is_plain():
    q, k, v = inputs()
    text = lambda kind: str(jax.make_jaxpr(lambda *x: causal_attention(*x, kind=kind))(q, k, v))
    assert text("auto") == text("plain")


def needs(target):
    try:
        launch.check_available(parse_target(target))
    except launch.Unavailable as error:
        return pytest.mark.skip(reason=str(error))
    return pytest.mark.xdist_group("absent")


def entry(name, **arguments):
    return Entry(function=f"tests.models.steps:{name}", arguments=arguments)


def counted(kind: str, packed: bool) -> int:
    step, args, _ = steps.gradients("attention", packed, dtype="bf16", attention=kind)
    return count_flops(jax.make_jaxpr(step)(*args))


@needs("v5e-1")
@pytest.mark.heavy
def test_auto_on_an_absent_tpu_is_splash(tmp_path, monkeypatch):
    """The choice is the target's: the process that traces and compiles has a CPU alone."""
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))
    report = measure_entry(entry("resolved_gradients", plan="attention", target="v5e-1"), "v5e-1")
    assert report.flops == counted("splash", False) < counted("plain", False)


@needs("h100")
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_auto_on_an_absent_gpu_is_cudnn(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))
    job = entry("resolved_gradients", plan="attention", target="h100", packed=packed)
    report = measure_entry(job, "h100")
    trace_cudnn(monkeypatch)
    assert report.flops == counted("cudnn", packed) < counted("plain", packed)
