"""Values as a plain loop over the blocks gives them: types, scalars, no blocks, eager calls."""

import logging

import jax
import jax.numpy as jnp
import pytest

import jaxckpt

PLANS = ("none", "full", "dots", "uniform:2", "sqrt", "log", "binomial:3", "3xsqrt/full")
W, X = 0.1 * jnp.ones((8, 16, 16)), jnp.linspace(-1, 1, 4 * 16).reshape(4, 16)


def scaled(x, w, s):
    return x + s * jnp.tanh(x @ w)


@pytest.mark.heavy
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("scale", [0.5, 2])
def test_python_scalars_have_weak_types(plan, dtype, scale):
    if dtype == "complex64" and plan == "dots":
        pytest.skip("refused by name")
    w, x = W.astype(dtype), X.astype(dtype)
    loss = lambda w, s: jnp.abs(jaxckpt.scan_blocks(scaled, w, x, s, remat=plan)).sum()
    out = jax.jit(lambda: jaxckpt.scan_blocks(scaled, w, x, scale, remat=plan))()
    assert out.dtype == dtype
    grads = jax.grad(loss)(w, scale)
    assert grads.dtype == dtype and bool(jnp.abs(grads).max() > 0)
    if isinstance(scale, float):
        assert jax.grad(loss, 1)(w, scale).dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_a_scalar_in_the_carry_takes_the_blocks_type(plan):
    """As in `lax.scan`: a running total that starts as 0 or 0.0."""
    block = lambda carry, w: (carry[0] + jnp.tanh(carry[0] @ w), carry[1] + carry[0].sum())
    run = lambda x, start: jaxckpt.scan_blocks(block, W.astype(x.dtype), (x, start), remat=plan)
    half = X.astype(jnp.bfloat16)
    assert run(half, 0.0)[1].dtype == jnp.bfloat16
    assert run(X, 0)[1].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"carry\[1\] changes from int32\[\] to float32\[\]"):
        run(X, jnp.int32(0))


@pytest.mark.parametrize("plan", [*PLANS[:-2], jaxckpt.schedules.uniform(8, 2)])
def test_no_blocks(plan):
    if isinstance(plan, str):
        assert jaxckpt.scan_blocks(scaled, W[:0], X, 0.5, remat=plan) is X
    else:
        with pytest.raises(ValueError, match="made for 8 blocks, there are 0"):
            jaxckpt.scan_blocks(scaled, W[:0], X, 0.5, remat=plan)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["full", "sqrt", "log", "uniform:2", "none", "full+offload:carry"])
def test_what_blocks_hand_on_is_kept_once(plan):
    """A mask in the carry weighs what it weighs as a const, and its gradient is right."""
    mask = jnp.linspace(0, 1, X.size).reshape(X.shape)
    carried = lambda w, m: jaxckpt.scan_blocks(
        lambda c, w: {**c, "x": scaled(c["x"], w, c["m"])}, w, {"x": X, "m": m}, remat=plan
    )
    const = lambda w, m: jaxckpt.scan_blocks(scaled, w, X, m, remat=plan)
    losses = (
        lambda w, m: carried(w, m)["x"].sum() + (carried(w, m)["m"] ** 2).sum(),
        lambda w, m: const(w, m).sum() + (m**2).sum(),
    )
    got, want = (jax.jit(jax.grad(loss, (0, 1)))(W, mask) for loss in losses)
    for a, b in zip(got, want, strict=True):
        assert float(jnp.abs(a - b).max()) <= 1e-5
    temps = [
        jaxckpt.measure(jax.grad(lambda w, run=run: run(w)), W).temp_bytes
        for run in (lambda w: carried(w, mask)["x"].sum(), lambda w: const(w, mask).sum())
    ]
    assert temps[0] == temps[1]
    # Its twin: a mask that every block changes is kept with every carry.
    changing = lambda c, w: {"x": scaled(c["x"], w, c["m"]), "m": c["m"] * 1.5}
    loss = lambda w: jaxckpt.scan_blocks(changing, w, {"x": X, "m": mask}, remat=plan)["x"].sum()
    assert jaxckpt.measure(jax.grad(loss), W).temp_bytes > temps[0]


class Compiled(logging.Handler):
    """Counts what JAX compiles."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        if "Compiling" in record.getMessage():
            self.lines.append(record.getMessage())


@pytest.fixture
def compiled():
    handler, logger = Compiled(), logging.getLogger("jax")
    logger.addHandler(handler)
    with jax.log_compiles(True):
        yield handler.lines
    logger.removeHandler(handler)


class Affine:
    """A block with state in Python, called by its method."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x, w):
        return x + self.scale * jnp.tanh(x @ w)

    def method(self, x, w):
        return self(x, w)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [*PLANS, "full+offload:carry"])
def test_a_second_eager_call_compiles_nothing(compiled, plan):
    affine = Affine(0.5)
    blocks = [jnp.sin, jnp.cos] * 4
    step = lambda carry, w: (affine(carry, w), carry.sum())
    steps = lambda w: jaxckpt.scan(step, X, w, reverse=True, remat=plan)[1].sum()

    def calls():
        jax.grad(steps)(W)
        stack = lambda block: lambda w: jaxckpt.scan_blocks(block, w, X, remat=plan)
        for block in (affine, affine.method, affine.__call__):
            run = stack(block)
            run(W)
            jax.grad(lambda w, run=run: run(w).sum())(W)
        if plan != "dots":
            jax.grad(lambda x: jaxckpt.chain(blocks, x, remat=plan).sum())(X)

    calls()
    assert compiled
    compiled.clear()
    calls()
    assert compiled == []


def test_eager_calls_see_what_changed():
    """What a block reads from Python is read at every call, as in a plain loop."""
    affine, array = Affine(0.5), [jnp.ones([16])]
    reads = lambda x, w: affine(x, w) + array[0]
    run = lambda: jaxckpt.scan_blocks(reads, W, X, remat="log")
    first = run()
    affine.scale = 0.25
    second = run()
    array[0] = 2 * array[0]
    third = run()
    assert float(jnp.abs(first - second).max()) > 0.1
    assert float(jnp.abs(third - second).max()) > 0.1
    want = X
    for w in W:
        want = affine(want, w) + array[0]
    assert float(jnp.abs(third - want).max()) < 1e-5
