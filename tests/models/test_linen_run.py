"""`linen.run`: a list that `setup()` made as it is, beside a plain loop over it."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import jaxckpt
from tests.transforms.cases import Counter, relative_error

L, WIDTH = 5, 6
X = jnp.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)
PLANS = ("none", "full", "dots", "sqrt", "binomial:2", "uniform:2", "2xfull/log")
RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1), "noise": jax.random.key(2)}
STATE = ["batch_stats", "intermediates"]


class Block(nn.Module):
    """Dropout twice, another stream, batch statistics, a sown value; a tuple, flags and None."""

    rate: float = 0.3
    width: int = 2 * WIDTH
    layer_idx: int = 0
    counter: Counter | None = None

    def setup(self):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        self.up = nn.Dense(self.width, kernel_init=init)
        self.down = nn.Dense(WIDTH)
        self.dropout = nn.Dropout(self.rate)

    @nn.compact
    def __call__(self, x, scale, mask=None, *, deterministic, act="tanh"):
        assert mask is None
        if self.counter is not None:
            jax.debug.callback(lambda _: self.counter(0), x[0, 0])
        x = nn.BatchNorm(use_running_average=deterministic)(x)
        hidden = {"tanh": jnp.tanh, "sin": jnp.sin}[act](self.up(x))
        hidden = self.dropout(hidden, deterministic=deterministic)
        if not deterministic:
            x = x + 0.1 * jax.random.normal(self.make_rng("noise"), x.shape)
        self.sow("intermediates", "mean", hidden.mean())
        made = self.dropout(self.down(hidden), deterministic=deterministic)
        return x + scale * made, hidden.mean()


class Model(nn.Module):
    plan: str | None = None
    rates: tuple[float, ...] = (0.3,) * L
    twice: bool = False
    first_width: int = 2 * WIDTH
    block: type[nn.Module] | functools.partial = Block

    def setup(self):
        make = lambda i, rate: self.block(rate=rate, layer_idx=i)
        if self.first_width != 2 * WIDTH:
            make = lambda i, rate: Block(rate, 2 * WIDTH if i else self.first_width, i)
        self.blocks = [make(i, rate) for i, rate in enumerate(self.rates)]

    def run(self, x, *args, **named):
        if self.plan is not None:
            return jaxckpt.linen.run(self.blocks, x, *args, **named, out=0, remat=self.plan)
        means = []
        for block in self.blocks:
            x, mean = block(x, *args, **named)
            means.append(mean)
        return x, jnp.stack(means)

    def __call__(self, x, scale, deterministic=False):
        for _ in range(1 + self.twice):
            x, means = self.run(x, scale, None, deterministic=deterministic, act="sin")
        return x, means


def gradients(model, variables, **named):
    """Returns a jitted loss, its gradients and the new state."""

    @jax.jit
    def run(params, scale):
        def loss(params, scale):
            (x, means), state = model.apply(
                {**variables, "params": params}, X, scale, rngs=RNGS, mutable=STATE, **named
            )
            return jnp.sin(x).sum() + (jnp.arange(1.0, L + 1) * means).sum(), state

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, scale)

    return run(variables["params"], jnp.full(WIDTH, 0.7))


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_a_list_equals_its_loop(plan):
    """Loss, gradients, batch statistics, what is sown; masks of dropout and of another stream."""
    variables = Model().init(RNGS, X, 0.7)
    found, want = (gradients(Model(one), variables) for one in (plan, None))
    assert jax.tree.structure(found) == jax.tree.structure(want)
    # A bias's gradient is a sum in which much cancels.
    assert relative_error(found, want) <= 2e-5


def test_init_makes_the_lists_parameters():
    chex.assert_trees_all_equal(Model("sqrt").init(RNGS, X, 0.7), Model().init(RNGS, X, 0.7))
    assert "blocks_4" in Model("sqrt").init(RNGS, X, 0.7)["params"]


class Masks(nn.Module):
    """Its masks alone, in sums that are exact, so that nothing is rounded."""

    rate: float
    layer_idx: int

    @nn.compact
    def __call__(self, x, *_, deterministic, act):
        for _ in range(2):
            x = nn.Dropout(self.rate, deterministic=deterministic)(jnp.ones_like(x)) + 0.5 * x
        return x, x[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("key", (jax.random.key(1), jax.random.PRNGKey(1)))
@pytest.mark.parametrize("twice", (True, False))
def test_masks_are_bit_equal(twice, key):
    run = lambda plan: Model(plan, block=Masks, twice=twice, rates=(0.5,) * L).apply(
        {}, X * 0, 0.7, rngs={"dropout": key}
    )
    chex.assert_trees_all_equal(run("sqrt"), run(None))
    assert len(jnp.unique(run("sqrt")[0])) > 1


@pytest.mark.slow
def test_numbers_may_differ():
    rates = tuple(0.1 * i for i in range(1, L + 1))
    variables = Model().init(RNGS, X, 0.7)
    found, want = (gradients(Model(one, rates=rates), variables) for one in ("log", None))
    assert relative_error(found, want) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("plan", ("full", "sqrt"))
def test_an_odd_layer_has_state_of_its_own(plan):
    variables = Model(first_width=3).init(RNGS, X, 0.7)
    found, want = (gradients(Model(one, first_width=3), variables) for one in (plan, None))
    assert jax.tree.structure(found) == jax.tree.structure(want)
    assert relative_error(found, want) <= 2e-5


def test_without_dropout_and_rngs():
    variables = Model().init(RNGS, X, 0.7)
    run = lambda plan: Model(plan).apply(variables, X, 0.7, True)
    assert relative_error(run("full"), run(None)) <= 1e-6


@pytest.mark.slow
def test_layers_are_run_again():
    counts = {}
    variables = Model().init(RNGS, X, 0.7)
    for plan in ("none", "full", "uniform:2"):
        counter = Counter()
        model = Model(plan, block=functools.partial(Block, counter=counter))
        jax.block_until_ready(gradients(model, variables))
        jax.effects_barrier()
        counts[plan] = counter.total
    assert counts == {"none": L, "full": 2 * L, "uniform:2": 2 * L - 3}


class Shifted(nn.Module):
    layer: nn.Module

    def __call__(self, x, *, by):
        return jnp.tanh(self.layer(x) + by)


class Shared(nn.Module):
    """Layers that hold one matrix of the model around them, and what differs beside them."""

    unroll: int = 0

    def setup(self):
        self.one = nn.Dense(WIDTH)
        self.blocks = [Shifted(self.one) for _ in range(L)]

    def __call__(self, x):
        by = jnp.linspace(0.0, 1.0, L)
        if self.unroll:
            options = {"unroll": self.unroll, "remat": "uniform:2"}
            return jaxckpt.linen.run(self.blocks, x, each={"by": by}, **options)
        for i, block in enumerate(self.blocks):
            x = block(x, by=by[i])
        return x


@pytest.mark.slow
@pytest.mark.parametrize("unroll", (1, L))
def test_a_shared_module_and_each(unroll):
    variables = Shared().init(RNGS, X)
    chex.assert_trees_all_equal(Shared(unroll).init(RNGS, X), variables)
    loss = lambda variables, unroll: jnp.sin(Shared(unroll).apply(variables, X)).sum()
    found, want = (jax.grad(loss)(variables, one) for one in (unroll, 0))
    assert relative_error(found, want) <= 1e-6
    assert list(found["params"]) == ["one"]


class Wrapped(nn.Module):
    """A layer whose dropout is inside of a lifted transformation."""

    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dropout)(0.5, deterministic=False)(x)


def applied(make, x=X, **options):
    """Returns a call of `linen.run` over what `make()` returns, in a module."""

    class Runs(nn.Module):
        def setup(self):
            self.blocks = make()

        def __call__(self, x):
            if self.is_initializing():
                for block in self.blocks:
                    block(x)
                return x
            return jaxckpt.linen.run(self.blocks, x, remat="full", **options)

    return Runs().apply(Runs().init(RNGS, x), x, rngs=RNGS)


def pair_of(*modules):
    return lambda: list(modules)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (pair_of(), {}, "layers is an empty list"),
        (
            lambda: [nn.Dense(WIDTH), nn.Dense(WIDTH, use_bias=False)],
            {},
            r"layers\[0\].use_bias is True and layers\[1\].use_bias is False; .*variables",
        ),
        (
            lambda: [nn.Dense(WIDTH), nn.LayerNorm()],
            {},
            r"layers\[0\] is .*Dense.* and layers\[1\] is .*LayerNorm.*equal layers",
        ),
        (
            lambda: [nn.Dense(WIDTH), nn.Dense(WIDTH + 1)],
            {},
            r"layers\[0\].features is 6 and layers\[1\].features is 7",
        ),
        (
            lambda: [Wrapped(), Wrapped()],
            {},
            r"layers\[0\] and layers\[1\] compute differently; .*outside of what nn.remat",
        ),
        (lambda: [nn.Dense(WIDTH)] * 2, {"out": 7}, "out=7 is the place of the carry"),
        (lambda: [nn.Dense(WIDTH + 1)], {}, "carry changes"),
        (lambda: [nn.Dense(WIDTH)], {"each": {"a": jnp.ones(3)}}, r"each\['a'\] has 3 rows"),
        (lambda: [nn.Dense(WIDTH)], {"unroll": 0}, "unroll is a whole number"),
    ],
)
def test_bad_input(make, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        applied(make, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Dense(WIDTH)], r"layers\[0\] is not bound"),
        ([jnp.tanh], r"layers\[0\] is .*tanh.*jaxckpt.run takes pytrees"),
        (nn.Dense(WIDTH), "linen.run takes a list of Linen modules first"),
    ],
)
def test_what_is_no_list_of_bound_modules(layers, message):
    with pytest.raises(ValueError, match=message):
        jaxckpt.linen.run(layers, X)
