"""`nnx.run`: a list of NNX modules as it is, beside a plain loop over it."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxckpt
from tests.transforms.cases import Counter, relative_error

L, WIDTH = 5, 6
X = jnp.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)
PLANS = ("none", "full", "dots", "sqrt", "binomial:2", "uniform:2", "2xfull/log")


class Layer(nnx.Module):
    """An MLP with dropout, batch statistics, sharding metadata, a static number, a flag."""

    def __init__(self, index, *, rngs, width=2 * WIDTH, counter=None):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", None))
        self.up = nnx.Linear(WIDTH, width, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(width, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.layer_idx = index
        self.counter = counter

    def __call__(self, x, scale, cache, *, act="tanh"):
        assert cache is None
        if self.counter is not None:
            jax.debug.callback(lambda _: self.counter(0), x[0, 0])
        hidden = {"tanh": jnp.tanh, "sin": jnp.sin}[act](self.up(self.norm(x)))
        return hidden.mean(), x + scale * self.dropout(self.down(hidden))


class Model(nnx.Module):
    def __init__(self, run, widths=(2 * WIDTH,) * L, **options):
        rngs = nnx.Rngs(0, dropout=1)
        layers = [Layer(i, rngs=rngs, width=width, **options) for i, width in enumerate(widths)]
        self.layers = getattr(nnx, "List", list)(layers)
        self.run = run

    def __call__(self, x, scale):
        return self.run(self.layers, x, scale, None, act="sin")


def loop(layers, x, *args, **named):
    means = []
    for layer in layers:
        mean, x = layer(x, *args, **named)
        means.append(mean)
    return jnp.stack(means), x


def ours(plan, **options):
    options = {"out": 1, "ignore": "layer_idx", "remat": plan} | options
    return lambda layers, *args, **named: jaxckpt.nnx.run(layers, *args, **named, **options)


@pytest.fixture(autouse=True)
def mesh():
    """One that the layers' metadata names."""
    with jax.set_mesh(jax.make_mesh((1,), ("in",), axis_types=(jax.sharding.AxisType.Auto,))):
        yield


@nnx.jit
def step(model, scale):
    def loss(model, scale):
        means, x = model(X, scale)
        return jnp.sin(x).sum() + (jnp.arange(1.0, L + 1) * means).sum()

    return nnx.value_and_grad(loss, argnums=(0, 1))(model, scale)


def outcomes(run, **options):
    """Returns two steps in a row, which differ in their dropout, and the state after them."""
    model = Model(run, **options)
    steps = [step(model, jnp.float32(0.7)) for _ in range(2)]
    keys = jax.random.key_data
    plain = lambda x: keys(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.tree.map(plain, jax.tree.leaves((steps, nnx.state(model))))


@pytest.fixture(scope="module")
def of_the_loop():
    with jax.set_mesh(jax.make_mesh((1,), ("in",), axis_types=(jax.sharding.AxisType.Auto,))):
        return outcomes(loop)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_a_list_equals_its_loop(plan, of_the_loop):
    """Loss, gradients, batch statistics and counters of dropout, in two calls."""
    assert relative_error(outcomes(ours(plan)), of_the_loop) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("plan", ("full", "sqrt"))
def test_an_odd_layer_has_statistics_of_its_own(plan):
    widths = (3, *(2 * WIDTH,) * (L - 1))
    found, want = (outcomes(run, widths=widths) for run in (ours(plan), loop))
    assert relative_error(found, want) <= 1e-5


@pytest.mark.slow
def test_the_masks_are_the_lists_own():
    model, other = Model(ours("sqrt")), Model(loop)
    for _ in range(2):
        assert relative_error(model(X, 0.7), other(X, 0.7)) <= 1e-6
    assert [layer.dropout.rngs.count[...] for layer in model.layers] == [2] * L


def test_metadata_and_paths_stay():
    model = Model(ours("full"))
    grads = step(model, jnp.float32(0.7))[1][0]
    before, after = (nnx.get_partition_spec(nnx.state(m)) for m in (Model(loop), model))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    spec = nnx.to_pure_dict(after)["layers"][3]["up"]["kernel"]
    assert spec == jax.sharding.PartitionSpec("in", None)
    assert grads["layers"][3]["up"]["kernel"].shape == (WIDTH, 2 * WIDTH)


@pytest.mark.slow
def test_layers_are_run_again():
    counts = {}
    for plan in ("none", "full", "uniform:2"):
        counter = Counter()
        jax.block_until_ready(step(Model(ours(plan), counter=counter), jnp.float32(0.7)))
        jax.effects_barrier()
        counts[plan] = counter.total
    assert counts == {"none": L, "full": 2 * L, "uniform:2": 2 * L - 3}


class Noise(nnx.Module):
    """Draws from what it holds, or from what it is handed."""

    def __init__(self, rngs=None, shared=None):
        self.rngs, self.shared = rngs, shared

    def __call__(self, x, *, rngs=None, gain=1.0):
        rngs = self.rngs if rngs is None else rngs
        if self.shared is not None:
            x = self.shared(x)
        return x * gain + rngs.noise.normal(x.shape)


@pytest.mark.slow
@pytest.mark.parametrize("unroll", (1, L))
@pytest.mark.parametrize("held", (True, False))
def test_streams_and_parts_that_layers_share(held, unroll):
    """A loop draws from one stream layer after layer, and one matrix has one gradient."""

    def run(run):
        linear, stream = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), nnx.Rngs(noise=3)

        def loss(linear, stream):
            layers = [Noise(stream if held else None, linear) for _ in range(L)]
            return jnp.sin(run(layers, X, **({} if held else {"rngs": stream}))).sum()

        made = [nnx.value_and_grad(loss)(linear, stream) for _ in range(2)]
        assert stream.noise.count[...] == 2 * L
        return [(value, nnx.to_pure_dict(grads)) for value, grads in made]

    def plain(layers, x, **named):
        for layer in layers:
            x = layer(x, **named)
        return x

    def ours(layers, x, **named):
        return jaxckpt.nnx.run(layers, x, remat="uniform:2", unroll=unroll, **named)

    assert relative_error(run(ours), run(plain)) <= 1e-5


def test_each_and_unrolled_layers():
    gains = jnp.linspace(0.5, 1.5, L)
    layers = lambda: [Noise(nnx.Rngs(noise=i)) for i in range(L)]
    run = lambda unroll: jaxckpt.nnx.run(layers(), X, each={"gain": gains}, unroll=unroll)
    want = X
    for layer, gain in zip(layers(), gains, strict=True):
        want = layer(want, gain=gain)
    assert relative_error([run(1), run(L)], [want] * 2) <= 1e-6


def made(**options):
    """Five layers, the last of them made with other options."""
    rngs = nnx.Rngs(0)
    return [Layer(0, rngs=rngs, **(options if i == L - 1 else {})) for i in range(L)]


class Sowing(nnx.Module):
    def __call__(self, x, *_, **__):
        self.seen = nnx.Intermediate(x.mean())
        return x


def pair():
    rngs = nnx.Rngs(noise=0)
    return [Noise(rngs), Noise(rngs), Noise(nnx.Rngs(noise=1))]


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (lambda: [], {}, "layers is an empty list"),
        (lambda: Layer(0, rngs=nnx.Rngs(0)), {}, "nnx.run takes a list of NNX modules first"),
        (lambda: [jnp.tanh], {}, r"layers\[0\] is .*tanh.*jaxckpt.run"),
        (
            lambda: made(width=3)[-2:],
            {},
            r"layers\[0\].up.kernel.value is float32\[6, 12\] and layers\[1\].up.kernel.value is",
        ),
        (lambda: Model(loop).layers, {"ignore": ()}, r"layer_idx is 0 .*ignore='layer_idx'"),
        (lambda: made(), {"each": {"a": jnp.ones(3)}}, r"each\['a'\] has 3 rows, there are 5"),
        (lambda: made(), {"out": 2}, "out=2 is the place of the carry"),
        (lambda: made(), {"out": None}, "the structure changes"),
        (lambda: made(), {"out": 0}, "changes"),
        (lambda: made(), {"unroll": 0}, "unroll is a whole number"),
        (lambda: [Sowing(), Sowing()], {"out": None}, "a layer makes seen when it is called"),
    ],
)
def test_bad_input(layers, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        ours("full", **options)(layers(), X, 0.5, None)
    assert "\n" not in str(caught.value)


def test_some_layers_that_share_what_changes_are_refused():
    with pytest.raises(ValueError, match=r"some of the layers share rngs.noise.count"):
        jaxckpt.nnx.run(pair(), X)
