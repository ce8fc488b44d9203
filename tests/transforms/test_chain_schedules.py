"""`chain` under schedules: what `optimal_chain` plans is what runs, block by block."""

import collections
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt import schedules
from jaxckpt.schedules.actions import Record, Reverse
from jaxckpt.schedules.schedule import Schedule
from tests.transforms.cases import Counter, relative_error

# On jax 0.12 every plan that runs blocks again, `full` too, differs by up to 7.2e-6 from `none`,
# whose unrolled blocks XLA fuses across; docs/theory.md names the case.
TOLERANCE = 1e-6 if jax.__version_info__ < (0, 12) else 1e-5

SIZES = (6, 10, 3, 3, 8, 5, 9, 4)
NUM_BLOCKS = len(SIZES) - 1
COSTS = {
    "forward": [a * b for a, b in itertools.pairwise(SIZES)],
    "backward": [2 * a * b for a, b in itertools.pairwise(SIZES)],
    "carry_bytes": SIZES,
    "residual_bytes": [3 * size for size in SIZES[1:]],
}


def planned(budget: int) -> Schedule:
    return schedules.optimal_chain(**COSTS, budget=budget)


def least_budget() -> int:
    with pytest.raises(schedules.BudgetTooSmall) as caught:
        planned(0)
    return caught.value.least_bytes


BUDGETS = (least_budget(), least_budget() + 8, least_budget() + 30, 10_000)


def parameters():
    keys = jax.random.split(jax.random.key(0), NUM_BLOCKS)
    shapes = itertools.pairwise(SIZES)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def loss(weights, x, plan, counter=None, **options):
    """A chain with dropout, a carry of two dtypes and, if asked, a count of evaluations."""

    def layer(w, index):
        key = jax.random.fold_in(jax.random.key(1), index)

        def block(carry):
            x, seen = carry
            if counter is not None:
                jax.debug.callback(counter, index)
            y = jnp.tanh(jaxckpt.tag(x @ w, "product"))
            return jnp.where(jax.random.bernoulli(key, 0.8, y.shape), y, 0.0), seen + 1

        return block

    blocks = [layer(w, index) for index, w in enumerate(weights)]
    y, seen = jaxckpt.chain(blocks, (x, jnp.int32(0)), remat=plan, **options)
    return jnp.sin(y).sum() * seen


def gradients(plan, **options):
    fn = jax.jit(jax.value_and_grad(lambda w, x: loss(w, x, plan, **options), (0, 1)))
    return fn(parameters(), jnp.ones((4, SIZES[0])))


@pytest.mark.heavy
@pytest.mark.parametrize("budget", BUDGETS)
def test_gradients_equal_none_with_dropout(budget):
    assert relative_error(gradients(planned(budget)), gradients("none")) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("plan", ["binomial:1", "binomial:3", "log", "uniform:2+dots"])
def test_plans_equal_none_with_dropout(plan):
    assert relative_error(gradients(plan), gradients("none")) <= TOLERANCE


def evaluations(plan, **options) -> tuple[int, ...]:
    counter = Counter()
    jax.block_until_ready(gradients(plan, counter=counter, **options))
    jax.effects_barrier()
    return tuple(counter.counts.get(block, 0) for block in range(NUM_BLOCKS))


@pytest.mark.slow
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_block_runs_as_often_as_planned(budget):
    """The twin: budgets differ in what is run again, and so does what runs."""
    schedule = planned(budget)
    assert evaluations(schedule) == schedule.counts.evaluations


@pytest.mark.slow
def test_smaller_budgets_run_more():
    totals = [sum(evaluations(planned(budget))) for budget in BUDGETS]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == NUM_BLOCKS < totals[0]


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2, NUM_BLOCKS])
def test_binomial_runs_as_often_as_counted(slots):
    schedule = schedules.binomial(NUM_BLOCKS, slots)
    assert evaluations(f"binomial:{slots}") == schedule.counts.evaluations
    assert evaluations(schedule) == schedule.counts.evaluations


def residual_bytes(plan) -> int:
    """Returns the bytes that the backward pass is handed, weights and the chain's input aside."""
    weights, x = parameters(), jnp.ones((4, SIZES[0]))
    saved = jax.eval_shape(
        lambda *args: jax.vjp(lambda w, x: loss(w, x, plan), *args)[1], weights, x
    )
    ours = collections.Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(saved))
    given = {(leaf.shape, leaf.dtype) for leaf in [*weights, x]}
    return sum(
        int(np.prod(shape)) * dtype.itemsize * count
        for (shape, dtype), count in ours.items()
        if (shape, dtype) not in given
    )


@pytest.mark.slow
def test_less_is_kept_under_a_smaller_budget():
    kept = [residual_bytes(planned(budget)) for budget in BUDGETS]
    assert kept == sorted(kept) and kept[0] < kept[-1] / 2


@pytest.mark.heavy
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_an_absent_tpu_needs_less_under_a_smaller_budget():
    """Barriers hold there on every version. Carries are too large for on-chip memory: 32 MiB."""
    length = 16

    def temp_bytes(plan) -> int:
        def total(weights, x):
            blocks = [lambda x, w=w: x + jnp.tanh(x @ w) for w in weights]
            return jaxckpt.chain(blocks, x, remat=plan).sum()

        weights = [jax.ShapeDtypeStruct((1024, 1024), jnp.float32)] * length
        x = jax.ShapeDtypeStruct((8192, 1024), jnp.float32)
        return jaxckpt.measure(jax.grad(total, (0, 1)), weights, x, target="v5e-1").temp_bytes

    equal = {"forward": [1] * length, "backward": [2] * length, "residual_bytes": [3] * length}
    plan = lambda budget: schedules.optimal_chain(
        **equal, carry_bytes=[1] * (length + 1), budget=budget
    )
    small, large, none = temp_bytes(plan(10)), temp_bytes(plan(28)), temp_bytes("none")
    assert small < large < none and small < none / 2


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="XLA's CPU backend drops barriers before jax 0.12"
)
def test_compiled_memory_is_what_the_schedule_holds():
    """Equal blocks of 1 MiB carries and 3 carries of residuals, at two budgets."""
    length, mib = 24, 2**20

    def temp_bytes(plan) -> int:
        def total(weights, x):
            blocks = [lambda x, w=w: x + jnp.tanh(x * w) for w in weights]
            return jaxckpt.chain(blocks, x, remat=plan).sum()

        weights = [jax.ShapeDtypeStruct((1,), jnp.float32)] * length
        x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
        return jaxckpt.measure(jax.grad(total, (0, 1)), weights, x).temp_bytes

    equal = {"forward": [1] * length, "backward": [2] * length, "residual_bytes": [3] * length}
    for budget in (12, 40):
        schedule = schedules.optimal_chain(**equal, carry_bytes=[1] * (length + 1), budget=budget)
        assert temp_bytes(schedule) <= budget * mib < temp_bytes("none")


@pytest.mark.heavy
@pytest.mark.parametrize(
    "plan",
    [
        planned(BUDGETS[0]),
        pytest.param("log", marks=pytest.mark.heavy),
        pytest.param("sqrt+offload:carry", marks=pytest.mark.heavy),
    ],
)
def test_inside_jit_vmap_scan_and_twice(plan):
    weights, x = parameters(), jnp.ones((4, SIZES[0]))
    twice = lambda plan: lambda w, x: loss(w, x, plan) + loss(w, 2 * x, plan)
    grad = lambda plan: jax.jit(jax.grad(twice(plan)))
    assert relative_error(grad(plan)(weights, x), grad("none")(weights, x)) <= TOLERANCE
    rows = lambda plan: jax.jit(jax.vmap(grad(plan), (None, 0)))(weights, x[:, None])
    assert relative_error(rows(plan), rows("none")) <= TOLERANCE

    def accumulated(plan):
        add = lambda total, x: (jax.tree.map(jnp.add, total, grad(plan)(weights, x)), None)
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, weights), x[:, None])[0]

    assert relative_error(accumulated(plan), accumulated("none")) <= TOLERANCE


def test_a_schedule_of_another_chain():
    with pytest.raises(ValueError, match=r"optimal_chain\(budget=10000\) is made for 7 blocks, "):
        jaxckpt.chain([jnp.sin] * 3, 1.0, remat=planned(10_000))
    with pytest.raises(NotImplementedError, match="nested=True runs plans, such as 'sqrt'"):
        jaxckpt.chain([jnp.sin] * 7, 1.0, remat=planned(10_000), nested=True)


def test_an_illegal_schedule_is_refused_before_tracing():
    def block(x):
        raise AssertionError("traced")

    wrong = Schedule(2, (Record(0, 2), Reverse(0), Reverse(1)))
    with pytest.raises(schedules.IllegalSchedule, match="from the last to the first"):
        jaxckpt.chain([block, block], 1.0, remat=wrong)


def test_higher_derivatives_are_refused_by_name():
    blocks = [lambda x: jnp.sin(x)] * 7
    run = lambda x, **options: jaxckpt.chain(blocks, x, **options)
    with pytest.raises(NotImplementedError, match=r"remat='full' or nested=True"):
        jax.grad(jax.grad(lambda x: run(x, remat="log")))(1.0)
    with pytest.raises(NotImplementedError, match=r"remat='full' or nested=True"):
        jax.jvp(lambda x: run(x, remat=planned(10_000)), (1.0,), (1.0,))
    nested = jax.grad(jax.grad(lambda x: run(x, remat="log", nested=True)))(1.0)
    assert np.isclose(nested, jax.grad(jax.grad(lambda x: run(x, remat="none")))(1.0))
