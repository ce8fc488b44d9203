"""`jaxckpt.while_loop` beside a Python loop: values, gradients, what runs."""

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt import schedules
from jaxckpt.schedules.of_stage import under_loss
from jaxckpt.schedules.segments import two_level
from tests.transforms.cases import Counter, relative_error

W = 0.4 * jax.random.normal(jax.random.key(0), (6, 6))
H = jax.random.normal(jax.random.key(1), (3, 6))


def loss(w, h, stop, loop):
    """Runs a loop of `stop` steps, whose body decides by the time as solvers' bodies do."""

    def body(carry):
        h, n = carry
        h = jnp.where(n >= 3, jnp.tanh(h @ w) + 0.1 * h, jnp.sin(h @ w))
        return h, n + 1

    h, n = loop(lambda carry: carry[1] < stop, body, (h, 0))
    return jnp.sin(h).sum(), n


def by_hand(most: int, stop: int):
    def loop(cond, body, carry):
        for _ in range(min(most, stop)):
            carry = body(carry)
        return carry

    return loop


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", ["sqrt", "log", "binomial:1", "binomial:4", "none", "full", "dots"]
)
@pytest.mark.parametrize("most", [1, 11])
def test_every_end(plan, most):
    plan = plan.replace(":4", f":{min(4, most)}")
    loop = lambda *args: jaxckpt.while_loop(*args, max_steps=most, remat=plan)
    ours = jax.jit(jax.grad(lambda *args: loss(*args, loop), (0, 1), has_aux=True))
    for stop in sorted({0, 1, 2, most // 2, most - 1, most, most + 2}):
        found, steps = ours(W, H, stop)
        assert steps == min(most, stop)
        plain = lambda w, h, stop=stop: loss(w, h, stop, by_hand(most, stop))
        expected, _ = jax.grad(plain, (0, 1), has_aux=True)(W, H)
        assert relative_error(found, expected) <= 1e-6


def evaluations(most: int, stop: int, plan) -> int:
    counter = Counter()

    def body(carry):
        jax.debug.callback(counter, carry[1])
        return jnp.tanh(carry[0] @ W), carry[1] + 1

    cond = lambda carry: carry[1] < stop
    loop = lambda h: jaxckpt.while_loop(cond, body, (h, 0), max_steps=most, remat=plan)[0].sum()
    jax.block_until_ready(jax.jit(jax.grad(loop))(H))
    jax.effects_barrier()
    assert set(counter.counts) == set(range(min(most, stop)))
    return counter.total


@pytest.mark.slow
def test_a_loop_that_runs_to_its_end_costs_what_the_schedule_says():
    for plan, schedule in {
        "binomial:3": schedules.binomial(20, 3),
        "sqrt": two_level(20),
    }.items():
        expected = 20 + under_loss(schedule).extra_forwards
        assert evaluations(20, 20, plan) == expected
        # An early end runs fewer steps, and never those after it.
        counts = [evaluations(20, stop, plan) for stop in (1, 5, 12)]
        assert counts == sorted(counts) and counts[-1] < expected
    assert evaluations(20, 0, "sqrt") == 0


def test_memory_is_that_of_the_slots():
    big = jnp.ones([64, 64])
    body = lambda carry: (jnp.tanh(carry[0] @ big), carry[1] + 1)
    loop = lambda h, plan: jaxckpt.while_loop(
        lambda carry: carry[1] < 100, body, (h, 0), max_steps=256, remat=plan
    )[0].sum()
    temp = lambda plan: jaxckpt.measure(jax.grad(lambda h: loop(h, plan)), big).temp_bytes
    assert temp("binomial:4") <= 16 * big.nbytes
    assert temp("full") >= 256 * big.nbytes  # the twin


@pytest.mark.slow
def test_each_example_of_a_batch_ends_by_itself():
    """Newton's iterations to a tolerance, under vmap, inside the gradient and outside."""

    def root(a):
        close = lambda x: jnp.abs(x * x - a) > 1e-4 * a
        return jaxckpt.while_loop(close, lambda x: (x + a / x) / 2, a, max_steps=40, remat="log")

    a = jnp.array([2.0, 9.0, 1.0, 1e4])
    one_by_one = jnp.stack([jax.grad(root)(x) for x in a])
    assert relative_error(jax.vmap(root)(a), jnp.sqrt(a)) <= 1e-3
    assert relative_error(jax.vmap(jax.grad(root))(a), one_by_one) <= 1e-6
    assert relative_error(jax.grad(lambda a: jax.vmap(root)(a).sum())(a), one_by_one) <= 1e-6


def test_forward_over_reverse():
    power = lambda x: jaxckpt.while_loop(
        lambda c: c[1] < 4, lambda c: (c[0] * x, c[1] + 1), (x, 0), max_steps=7, remat="binomial:2"
    )[0]
    assert jax.hessian(power)(2.0) == pytest.approx(5 * 4 * 2.0**3)
    with pytest.raises(NotImplementedError, match="second reverse mode"):
        jax.grad(jax.grad(power))(2.0)


CARRY = (H, 0)
SAME = lambda carry: carry
LESS = lambda carry: carry[1] < 3


@pytest.mark.parametrize(
    ("cond", "body", "options", "message"),
    [
        (None, SAME, {}, "cond of while_loop is a function"),
        (LESS, 3, {}, "body of while_loop is a function"),
        (LESS, SAME, {"max_steps": 0}, "max_steps is a whole number of steps, at least 1, not 0"),
        (
            LESS,
            SAME,
            {"max_steps": 2.5},
            "max_steps is a whole number of steps, at least 1, not 2.5",
        ),
        (lambda carry: carry[0], SAME, {}, "cond of while_loop returns a boolean scalar"),
        (lambda carry: carry[1], SAME, {}, "cond of while_loop returns a boolean scalar"),
        (
            LESS,
            lambda carry: (carry[0][0], carry[1]),
            {},
            r"carry\[0\] changes from float32\[3, 6\]",
        ),
        (LESS, lambda carry: carry[0], {}, "the structure changes"),
        (LESS, SAME, {"remat": "uniform:2"}, "keeps whole segments.*sqrt, log and binomial:N"),
        (LESS, SAME, {"remat": "4xfull/sqrt"}, "has several stages; while_loop takes one"),
        (LESS, SAME, {"remat": "sqrt+offload:carry"}, "takes no policies with a schedule"),
        (LESS, SAME, {"remat": "sqrtt"}, "sqrt"),
        (LESS, SAME, {"remat": schedules.binomial(4, 2)}, "made for 4 blocks, there are 8"),
    ],
)
def test_bad_input(cond, body, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        jaxckpt.while_loop(cond, body, CARRY, **({"max_steps": 8} | options))
    assert "\n" not in str(caught.value)
