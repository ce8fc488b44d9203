"""Stacks under JAX's other transformations, each beside a plan that recomputes nothing."""

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.experimental import checkify

import jaxckpt
from tests.transforms.cases import Counter, relative_error

L, WIDTH = 6, 8
W = 0.3 * jax.random.normal(jax.random.key(0), (L, WIDTH, WIDTH))
X = jnp.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)
PLANS = ("full", "dots", "uniform:2", "sqrt", "log", "binomial:2")


def block(x, w):
    return x + jnp.tanh(x @ w)


def checked(x, w):
    checkify.check(x[0, 0] < 100, "too large: {x}", x=x[0, 0])
    return block(x, w)


def loss_of(plan, block=block):
    return lambda w, x: jnp.sin(jaxckpt.scan_blocks(block, w, x, remat=plan)).sum()


def gradients(plan, block=block):
    return jax.grad(loss_of(plan, block), (0, 1))


WANT = gradients("none")(W, X)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ("full", "dots", "none"))
def test_checkify_sees_what_a_block_checks(plan):
    run = checkify.checkify(jax.jit(loss_of(plan, checked)))
    error, value = run(W, X)
    assert error.get() is None
    assert relative_error(value, loss_of("none")(W, X)) <= 1e-6
    error, _ = run(W, X.at[0, 0].set(1000.0))
    assert "too large: 1000" in (error.get() or "")
    nested = lambda w, x: jaxckpt.scan_blocks(checked, w, x, remat="sqrt", nested=True).sum()
    error, _ = checkify.checkify(jax.jit(nested))(W, X.at[0, 0].set(1000.0))
    assert "too large: 1000" in (error.get() or "")


@pytest.mark.parametrize("plan", ("uniform:2", "sqrt", "log", "2xfull/sqrt"))
def test_schedules_refuse_what_checkify_would_not_see(plan):
    with pytest.raises(
        jaxckpt.PlanError, match=r"checkify does not see .*; none, full and policies"
    ):
        checkify.checkify(loss_of(plan, checked))(W, X)
    blocks = [lambda x, w=w: checked(x, w) for w in W]
    with pytest.raises(jaxckpt.PlanError, match="checkify does not see a check"):
        checkify.checkify(lambda x: jaxckpt.chain(blocks, x, remat=plan))(X)
    # Errors that checkify finds by itself need no check in the block.
    found = checkify.checkify(jax.jit(loss_of(plan)), errors=checkify.float_checks)
    assert found(W, X)[0].get() is None


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_debug_print_and_callbacks(plan, capfd):
    """Each layer prints when it runs, and once more when it is run again."""

    def told(x, w):
        jax.debug.print("norm {n}", n=jnp.square(x).sum())
        return block(x, w)

    assert relative_error(jax.jit(gradients(plan, told))(W, X), WANT) <= 1e-6
    jax.effects_barrier()
    assert capfd.readouterr().out.count("norm") > L
    jax.block_until_ready(jax.jit(gradients("none", told))(W, X))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("norm") == L


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_debug_nans(plan):
    poisoned = lambda x, w: jnp.log(block(x, w) - 1e9)
    with jax.debug_nans(True):
        assert relative_error(jax.jit(gradients(plan))(W, X), WANT) <= 1e-6
        with pytest.raises(FloatingPointError, match="nan"):
            jax.block_until_ready(jax.jit(gradients(plan, poisoned))(W, X))


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_export(plan):
    """The exported program runs blocks again, as it says in its size."""
    fn = jax.jit(gradients(plan))
    data = export.export(fn)(W, X).serialize()
    found = export.deserialize(data).call(W, X)
    assert relative_error(found, WANT) <= 1e-6
    flops = lambda plan: jax.jit(gradients(plan)).lower(W, X).as_text().count("stablehlo.dot_gen")
    assert flops(plan) > flops("none") or plan == "dots"


@pytest.mark.parametrize("plan", PLANS)
def test_eval_shape(plan):
    made = jax.eval_shape(gradients(plan), W, X)
    assert [x.shape for x in made] == [W.shape, X.shape]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ("full", "uniform:2", "sqrt", "log", "binomial:2"))
@pytest.mark.parametrize("dtype", ("float64", "complex64", "complex128"))
def test_other_numbers(plan, dtype):
    def loss(plan):
        return lambda w, x: jnp.abs(jaxckpt.scan_blocks(block, w, x, remat=plan)).sum()

    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else _enable_x64():
        factor = 1 + 0.5j if dtype.startswith("complex") else 1.0
        args = [(factor * jnp.asarray(x)).astype(dtype) for x in (W, X)]
        found, want = (jax.jit(jax.grad(loss(p), (0, 1)))(*args) for p in (plan, "none"))
        assert all(x.dtype == dtype for x in found)
        assert relative_error(found, want) <= (1e-6 if dtype == "complex64" else 1e-14)
        products = lambda p: jaxckpt.measure(jax.grad(loss(p), (0, 1)), *args).flops
        assert products(plan) > 1.1 * products("none")


def _enable_x64():
    from jax.experimental import enable_x64

    return enable_x64()


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_checkpoint_around_and_inside(plan):
    """Around, all blocks are run once more; inside, each is when it is reversed."""
    inner = jax.checkpoint(block)
    outer = jax.grad(jax.checkpoint(loss_of(plan)), (0, 1))
    for fn in (outer, gradients(plan, inner)):
        assert relative_error(jax.jit(fn)(W, X), WANT) <= 1e-6

    def evaluations(wrap, inside):
        counter = Counter()

        def counted(x, w):
            jax.debug.callback(lambda _: counter(0), x[0, 0])
            return block(x, w)

        fn = wrap(loss_of(plan, inside(counted)))
        jax.block_until_ready(jax.jit(jax.grad(fn, (0, 1)))(W, X))
        jax.effects_barrier()
        return counter.total

    same = lambda fn: fn
    assert evaluations(jax.checkpoint, same) > evaluations(same, same)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pmap.*")
@pytest.mark.parametrize("plan", PLANS)
def test_pmap(plan):
    def mean(x, w):
        return x + jnp.tanh(jax.lax.pmean(x, "d") @ w)

    def run(plan):
        return jax.pmap(gradients(plan, mean), axis_name="d", in_axes=(None, 0))(W, X[None])

    found, want = run(plan), run("none")
    assert relative_error(found, want) <= 1e-6
    assert relative_error(tuple(x[0] for x in found), WANT) <= 1e-6


@pytest.mark.parametrize("plan", ("full+offload:carry", "sqrt", "uniform:2"))
def test_a_second_reverse_mode_is_refused_in_one_sentence(plan):
    norm = lambda w: jnp.square(jax.grad(loss_of(plan))(w, X)).sum()
    with pytest.raises(NotImplementedError, match=r"second reverse mode.*remat='full'.* has") as e:
        jax.make_jaxpr(jax.grad(norm))(W)
    assert "\n" not in str(e.value)
    # The twin: without the schedule or the host there is one.
    plain = lambda w: jnp.square(jax.grad(loss_of("full"))(w, X)).sum()
    assert jax.make_jaxpr(jax.grad(plain))(W)


def test_offload_has_forward_mode_and_one_reverse_mode():
    tangent = jnp.ones_like(W)
    run = lambda plan: jax.jvp(lambda w: gradients(plan)(w, X), (W,), (tangent,))
    assert relative_error(run("full+offload:carry"), run("none")) <= 1e-5
