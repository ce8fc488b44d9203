"""Random blocks under random plans and transformations, against a plain Python loop.

The plans' recomputation has its twin in test_random_plans.py; that the comparison itself sees a
wrong gradient is tested at the end.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

import jaxckpt
from jaxckpt.transforms import custom_gradient
from tests.transforms.test_random_plans import plans

WIDTH, BATCH = 4, 3
# How far a loop may be from an unrolled program, of a leaf's largest value: XLA fuses them apart.
TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "complex64": 2e-5, "bfloat16": 0.15}
USES = ("jit", "eager", "vmap", "each", "remat", "donate")


@dataclasses.dataclass(frozen=True)
class Program:
    """A block and its surroundings.

    Attributes:
      dtype: Of the parameters and the carry.
      scale: A const: a Python scalar or None for an array.
      parts: What the block holds beside a product and a tanh.
      use: How the gradient is taken.
      num_blocks: L.
      plan: The plan's text.
    """

    dtype: str
    scale: float | int | None
    parts: frozenset[str]
    use: str
    num_blocks: int
    plan: str


@st.composite
def programs(draw) -> Program:
    num_blocks, plan = draw(plans(most_blocks=9))
    dtype = draw(st.sampled_from(sorted(TOLERANCES)))
    if dtype == "complex64":  # refused by name, see test_errors.py
        plan = "/".join(stage.partition("+")[0] for stage in plan.split("/"))
    parts = ("dropout", "mask", "cond", "scan", "counter", "closure", "key")
    return Program(
        dtype=dtype,
        scale=draw(st.sampled_from((0.5, 2, None))),
        parts=draw(st.frozensets(st.sampled_from(parts))),
        use=draw(st.sampled_from(USES)),
        num_blocks=num_blocks,
        plan=plan,
    )


def arguments(program: Program):
    """Returns `(w, x)`, which are differentiated, and what is not."""
    keys = jax.random.split(jax.random.key(program.num_blocks), 4)
    w = 0.4 * jax.random.normal(keys[0], (program.num_blocks, WIDTH, WIDTH))
    x = jax.random.normal(keys[1], (BATCH, WIDTH))
    rows = {
        "key": jax.random.split(keys[2], program.num_blocks),
        "index": jnp.arange(program.num_blocks, dtype=jnp.int32),
    }
    mask = jax.random.bernoulli(keys[3], 0.7, (BATCH, WIDTH))
    return (w.astype(program.dtype), x.astype(program.dtype)), rows, mask


def block_of(program: Program, closed_over):
    """Returns `block(carry, row, scale, key) -> carry`."""

    def block(carry, row, scale, key):
        x = carry["x"]
        hidden = jaxckpt.tag(x @ row["w"], "hidden") * scale
        if "closure" in program.parts:
            hidden = hidden + closed_over
        if "dropout" in program.parts:
            kept = jax.random.bernoulli(row["key"], 0.8, hidden.shape)
            hidden = jnp.where(kept, hidden, 0)
        if "key" in program.parts:
            noise = jax.random.normal(jax.random.fold_in(key, row["index"]), hidden.shape)
            hidden = hidden + 0.1 * noise.astype(hidden.dtype)
        if "cond" in program.parts:
            hidden = lax.cond(row["index"] % 2 == 0, jnp.tanh, lambda h: 0.5 * h, hidden)
        if "scan" in program.parts:
            hidden = lax.scan(lambda h, _: (h + 0.1 * jnp.sin(h), None), hidden, None, length=2)[0]
        if "mask" in program.parts:
            hidden = jnp.where(carry["mask"], hidden, 0)
        made = {**carry, "x": x + 0.5 * jnp.tanh(hidden)}
        if "counter" in program.parts:
            made["counter"] = carry["counter"] + row["index"]
        return made

    return block


def gradients(program: Program, run):
    """Returns the loss and its gradients, of a stack that `run(block, rows, carry, *consts)` runs.

    Args:
      program: What is drawn.
      run: Runs the blocks.
    """
    (w, x), rows, mask = arguments(program)
    # A Python scalar is handed on as it is: its type is weak.
    scale = jnp.full([WIDTH], 0.7, program.dtype) if program.scale is None else program.scale

    def loss(w, x, closed_over):
        carry = {"x": x}
        if "mask" in program.parts:
            carry["mask"] = mask[: x.shape[0]]  # vmap hands over one row at a time
        if "counter" in program.parts:
            carry["counter"] = 0
        block = block_of(program, closed_over)
        out = run(block, {"w": w, **rows}, carry, scale, jax.random.key(7))
        assert out["x"].dtype == program.dtype, out["x"].dtype
        return jnp.abs(out["x"]).astype("float32").sum() + 0.1 * out.get("counter", 0)

    closed_over = jnp.linspace(-1, 1, WIDTH).astype(program.dtype)
    fn = loss
    if program.use == "vmap":
        batched = jax.vmap(loss, (None, 0, None))
        fn = lambda w, x, c: batched(w, x[:, None], c).sum()
    if program.use == "remat":
        fn = jax.checkpoint(loss)
    fn = jax.value_and_grad(fn, (0, 1, 2))
    if program.use == "each":  # gradients of each example
        of_each = jax.vmap(fn, (None, 0, None))
        fn = lambda w, x, c: of_each(w, x[:, None], c)
    if program.use != "eager":
        fn = jax.jit(fn, donate_argnums=(0,) if program.use == "donate" else ())
    return fn(w, x, closed_over)


def python_loop(block, rows, carry, *consts):
    for index in range(rows["index"].shape[0]):
        carry = block(carry, jax.tree.map(lambda leaf, i=index: leaf[i], rows), *consts)
    return carry


def error_of(program: Program) -> float:
    """Returns the largest difference to the Python loop, in units of what is allowed."""
    stack = lambda *args: jaxckpt.scan_blocks(*args, remat=program.plan)
    context = contextlib.nullcontext()
    if program.dtype == "float64":
        context = jax.enable_x64(True) if hasattr(jax, "enable_x64") else _enable_x64()
    with context:
        got, want = gradients(program, stack), gradients(program, python_loop)
    as_numpy = lambda tree: [
        np.asarray(leaf, "complex128" if program.dtype == "complex64" else "float64")
        for leaf in jax.tree.leaves(tree)
    ]
    errors = [
        np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)
        for a, b in zip(as_numpy(got), as_numpy(want), strict=True)
    ]
    return max(errors) / TOLERANCES[program.dtype]


def _enable_x64():
    from jax.experimental import enable_x64

    return enable_x64()


def check(program: Program):
    assert error_of(program) <= 1, program


SETTINGS = {"suppress_health_check": list(HealthCheck), "derandomize": True}


@pytest.mark.slow
@settings(max_examples=12, **SETTINGS)
@given(programs())
def test_some_programs(program):
    check(program)


@pytest.mark.heavy
@settings(max_examples=300, **SETTINGS)
@given(programs())
def test_many_programs(program):
    check(program)


@pytest.mark.slow
def test_the_comparison_sees_a_wrong_gradient(monkeypatch):
    program = Program("float32", 0.5, frozenset({"mask"}), "jit", 5, "log")
    assert error_of(program) <= 1
    right = custom_gradient._transpose
    wrong = lambda *args, **options: [g if g is None else 1.01 * g for g in right(*args, **options)]
    monkeypatch.setitem(custom_gradient.ad.primitive_transposes, custom_gradient._TRANSPOSED, wrong)
    assert error_of(program) > 1
