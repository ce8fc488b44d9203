"""Lists of layers of several kinds: plans count layers, and programs grow with the period."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt
from jaxckpt.transforms.jaxprs import equations
from jaxckpt.transforms.mixed import loops_of
from jaxckpt.transforms.observers import observed
from tests.transforms.cases import Counter, relative_error

WIDTH, TOKENS = 8, 12
PLANS = (
    "none",
    "full",
    "names:hidden",
    "sqrt",
    "log",
    "binomial:2",
    "uniform:3",
    "uniform:3+dots",
    "4xfull/none",
    "2xfull/5xuniform:2/dots",
)
# The orders of kinds: five to one with a remainder, pairs, two halves, no period, one odd layer.
ORDERS = {
    "five to one": "aaaaabaaaaabaa",
    "pairs": "abababab",
    "halves": "aaabbb",
    "any": "aababbba",
    "odd first": "baaaaa",
    "odd inside": "aaabaa",
}
X = jnp.linspace(-1, 1, TOKENS * WIDTH).reshape(TOKENS, WIDTH)


class Local(eqx.Module):
    """Mixes neighbours, with dropout."""

    up: jax.Array
    window: int = eqx.field(static=True)

    def __call__(self, x, key, counter=None):
        if counter is not None:
            jax.debug.callback(lambda _: counter(0), x[0, 0])
        near = sum(jnp.roll(x, i, 0) for i in range(self.window))
        hidden = jnp.tanh(jaxckpt.tag(near @ self.up, "hidden"))
        keep = jax.random.bernoulli(key, 0.8, hidden.shape)
        return x + jnp.where(keep, hidden, 0.0), hidden.mean()


class Experts(eqx.Module):
    """Another structure, other shapes, no dropout."""

    up: jax.Array
    down: jax.Array

    def __call__(self, x, key, counter=None):
        if counter is not None:
            jax.debug.callback(lambda _: counter(0), x[0, 0])
        hidden = jax.nn.gelu(x @ self.up)
        return x + hidden @ self.down, hidden.mean()


def layers_of(order: str):
    def make(kind, key):
        one, two = jax.random.split(key)
        up = 0.1 * jax.random.normal(one, (WIDTH, WIDTH if kind == "a" else 3 * WIDTH))
        if kind == "a":
            return Local(up, 2)
        return Experts(up, 0.1 * jax.random.normal(two, (3 * WIDTH, WIDTH)))

    keys = jax.random.split(jax.random.key(0), len(order))
    return [make(kind, key) for kind, key in zip(order, keys, strict=True)]


def loss_of(run):
    def loss(layers, x, scale):
        keys = jax.random.split(jax.random.key(1), len(layers))
        x, means = run(layers, scale * x, keys)
        return jnp.sin(x).sum() + (jnp.arange(1.0, len(layers) + 1) * means).sum()

    return loss


def loop(layers, x, keys):
    means = []
    for layer, key in zip(layers, keys, strict=True):
        x, mean = layer(x, key)
        means.append(mean)
    return x, jnp.stack(means)


def ours(plan, **options):
    def run(layers, x, keys):
        apply = lambda layer, x, key: layer(x, key)
        return jaxckpt.run(layers, apply, x, each={"key": keys}, out=0, remat=plan, **options)

    return run


def gradients(run, layers):
    return jax.jit(jax.value_and_grad(loss_of(run), (0, 1, 2)))(layers, X, jnp.float32(0.9))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "plan"),
    [
        *(("five to one", plan) for plan in PLANS),
        *((order, plan) for order in [*ORDERS][1:] for plan in ("dots", "sqrt")),
        *(("odd first", plan) for plan in ("none", "full", "log", "uniform:2", "1xnone/full")),
        ("any", "4xfull/none"),
    ],
)
def test_values_and_gradients_are_those_of_the_loop(order, plan):
    layers = layers_of(ORDERS[order])
    found, want = gradients(ours(plan), layers), gradients(loop, layers)
    assert jax.tree.structure(found) == jax.tree.structure(want)
    assert relative_error(found, want) <= 1e-5


def evaluations(plan, order) -> int:
    counter = Counter()
    apply = lambda layer, x, key: layer(x, key, counter)[0]
    keys = jax.random.split(jax.random.key(1), len(order))
    loss = lambda layers: jaxckpt.run(layers, apply, X, each={"key": keys}, remat=plan).sum()
    jax.block_until_ready(jax.jit(jax.grad(loss))(layers_of(order)))
    jax.effects_barrier()
    return counter.total


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", ("none", "full", "sqrt", "log", "binomial:2", "uniform:3", "4xfull/none")
)
def test_layers_are_run_as_often_as_equal_layers_are(plan):
    """A plan counts layers: kinds change nothing about how often layers are run."""
    order = ORDERS["five to one"]
    assert evaluations(plan, order) == evaluations(plan, "a" * len(order))
    assert evaluations("full", order) == 2 * len(order)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ("none", "full", "dots", "sqrt", "log", "uniform:4"))
def test_programs_grow_with_the_period_and_not_with_the_depth(plan):
    def products(periods):
        layers = layers_of("aaaaab" * periods + "aa")
        jaxpr = jax.make_jaxpr(jax.grad(loss_of(ours(plan))))(layers, X, 0.9)
        return sum(one.primitive.name == "dot_general" for one in equations(jaxpr))

    assert products(8) == products(4)


@pytest.mark.slow
@pytest.mark.parametrize(("order", "few", "many"), [("aaabbb", 1, 3), ("abababab", 2, 4)])
def test_unrolled_layers_are_in_the_program(order, few, many):
    def products(unroll):
        jaxpr = jax.make_jaxpr(loss_of(ours("full", unroll=unroll)))(layers_of(order), X, 0.9)
        return sum(one.primitive.name == "dot_general" for one in equations(jaxpr))

    assert products(many) == many // few * products(few)


def test_the_loops_own_program_grows():
    """The twin: a loop over the list."""
    layers = layers_of("ab" * 8)
    jaxprs = [jax.make_jaxpr(loss_of(loop))(layers[:n], X, 0.9) for n in (8, 16)]
    half, whole = (sum(e.primitive.name == "dot_general" for e in equations(j)) for j in jaxprs)
    assert whole == 2 * half


@pytest.mark.slow
def test_one_layers_residuals_are_live_at_a_time():
    """Beside the carries; a period as one block would hold six layers' residuals."""
    wide = jnp.ones([1024, WIDTH])
    mixed = "aaaaab" * 4

    def temp(plan, order):
        layers = layers_of(order)
        keys = jax.random.split(jax.random.key(1), len(order))
        apply = lambda layer, x, key: layer(x, key)[0]
        loss = lambda layers: jaxckpt.run(layers, apply, wide, each={"key": keys}, remat=plan).sum()
        return jaxckpt.measure(jax.grad(loss), layers).temp_bytes

    for plan in ("full", "sqrt"):
        assert temp(plan, mixed) <= 1.3 * max(temp(plan, "a" * 24), temp(plan, "b" * 24)), plan
    assert temp("none", mixed) > 3 * temp("full", mixed)


@pytest.mark.slow
def test_unrolled_layers_and_vmap():
    layers = layers_of(ORDERS["five to one"])
    want = gradients(loop, layers)
    for unroll in (2, 12, 14):
        assert relative_error(gradients(ours("full", unroll=unroll), layers), want) <= 1e-5
        assert relative_error(gradients(ours("sqrt", unroll=unroll), layers), want) <= 1e-5
    each = jnp.stack([X, 2 * X, 3 * X])

    def loss(run):
        return lambda layers: jax.vmap(lambda x: loss_of(run)(layers, x, 1.0))(each).sum()

    found, want = (jax.jit(jax.grad(loss(run)))(layers) for run in (ours("log"), loop))
    assert relative_error(found, want) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
def test_under_shard_map_and_on_an_explicit_mesh(kind):
    layers = layers_of("abab")
    mesh = jax.make_mesh((1,), ("d",), axis_types=(kind,))

    def mean(layer, x, key):
        x, y = layer(jax.lax.pmean(x, "d"), key)
        return x * (1 + jax.lax.axis_index("d")), y

    def loss(plan):
        def run(layers, x):
            keys = jax.random.split(jax.random.key(1), len(layers))
            return jaxckpt.run(layers, mean, x, each={"key": keys}, out=0, remat=plan)

        specs = {"in_specs": (P(), P("d")), "out_specs": (P("d"), P())}
        inner = lambda layers, x: (lambda x, y: (x, jax.lax.pmean(y, "d")))(*run(layers, x))
        mapped = jax.shard_map(inner, mesh=mesh, **specs)
        x = jax.device_put(X, NamedSharding(mesh, P("d")))
        return lambda layers: sum(jnp.sin(made).sum() for made in mapped(layers, x))

    plain = lambda layers: sum(
        jnp.sin(made).sum() for made in loop(layers, X, jax.random.split(jax.random.key(1), 4))
    )
    with jax.set_mesh(mesh):
        want = jax.jit(jax.grad(plain))(layers)
        for plan in ("full", "sqrt", "uniform:2"):
            assert relative_error(jax.jit(jax.grad(loss(plan)))(layers), want) <= 1e-5


@pytest.mark.parametrize(
    ("order", "unroll", "loops"),
    [
        ("aaaa", 1, [(0, 1, 4)]),
        ("aaaaab" * 4 + "aa", 1, [(0, 6, 4), (24, 1, 2)]),
        ("aaaaab" * 4 + "aa", 12, [(0, 12, 2), (24, 2, 1)]),
        ("abababab", 3, [(0, 2, 4)]),
        ("aaabbb", 1, [(0, 1, 3), (3, 1, 3)]),
        ("caaaa", 1, [(0, 1, 1), (1, 1, 4)]),
        ("abc", 1, [(0, 3, 1)]),
    ],
)
def test_loops_over_periods(order, unroll, loops):
    found = loops_of(order, unroll)
    assert found == loops
    covered = [i for first, period, trips in found for i in range(first, first + period * trips)]
    assert covered == list(range(len(order)))


def test_outputs_that_cannot_be_stacked():
    layers = layers_of("abab")
    apply = lambda layer, x: (x, jnp.ones(2) if isinstance(layer, Local) else jnp.ones(3))
    with pytest.raises(ValueError, match=r"layers\[0\] returns float32\[2\] and layers\[1\] ret"):
        jaxckpt.run(layers, apply, X, out=0, remat="full")


def test_the_layer_that_changes_the_carry_is_named():
    layers = layers_of("aaab")
    apply = lambda layer, x: x if isinstance(layer, Local) else x[1:]
    with pytest.raises(ValueError, match=r"layers\[3\] returns the carry .* changes from"):
        jaxckpt.run(layers, apply, X, remat="full")


def test_an_odd_layer_is_planned_and_costed_by_the_others():
    """The odd layer's parameters are not copied, and the planner costs a layer that repeats."""
    layers = layers_of("baaaaa")
    keys = jax.random.split(jax.random.key(1), len(layers))
    calls = []
    with observed(lambda call: (calls.append(call), call.carry)[1]):
        jax.make_jaxpr(lambda layers: ours("full")(layers, X, keys))(layers)
    (call,) = calls
    assert call.num_blocks == 6
    (_, (up, *_), _) = call.block.inputs
    assert jax.tree.leaves(up)[0].shape == (WIDTH, WIDTH)


@pytest.mark.slow
def test_fit_plans_a_list_with_an_odd_layer():
    layers, x = layers_of("baaaaa"), jnp.ones([4096, WIDTH])
    keys = jax.random.split(jax.random.key(1), len(layers))

    def step_for(plan):
        loss = lambda layers, x: jnp.sin(ours(plan)(layers, x, keys)[0]).sum()
        return jax.grad(loss), (layers, x)

    none = jaxckpt.measure(*(lambda fn, args: (fn, *args))(*step_for("none"))).peak_bytes
    result = jaxckpt.fit(step_for, num_blocks=6, budget=int(0.7 * none))
    assert result.report.peak_bytes <= result.budget_bytes < none
