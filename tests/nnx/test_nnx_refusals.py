"""What the NNX stack refuses: blocks with state, blocks that change themselves, bad plans."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxckpt
from jaxckpt import PlanError
from tests.nnx.test_nnx import WIDTH, Mlp, X


class Keeps(nnx.Module):
    """Holds a variable of some kind, from the start or from its first call."""

    def __init__(self, kind, *, late=False, rngs):
        self.kind, self.late = kind, late
        if not late:
            self.inner = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.inner.extra = kind(jnp.zeros(3))

    def __call__(self, x):
        if self.late:
            self.extra = self.kind(x)
        return x


class Mask(nnx.Variable):
    pass


def test_state_that_no_call_changes_is_kept():
    """Caches and masks that are only read, and a BatchNorm on fixed averages."""
    for kind in (nnx.Cache, Mask):
        stack = jaxckpt.nnx.Stack(functools.partial(Keeps, kind), 3, rngs=nnx.Rngs(0))
        assert stack(X).shape == X.shape
        assert stack.blocks.inner.extra[...].shape == (3, 3)
    stack = jaxckpt.nnx.Stack(functools.partial(nnx.BatchNorm, WIDTH), 3, rngs=nnx.Rngs(0))
    stack.eval()
    assert stack(X).shape == X.shape
    stack.train()
    with pytest.raises(ValueError) as caught:
        stack(X)
    assert str(caught.value) == (
        "the block changes mean, var (BatchStat) when it is called, which a stack of checkpointed "
        "blocks does not keep; give the stack carry=nnx.BatchStat, call eval() for fixed averages, "
        "or use a layer without state (LayerNorm or GroupNorm)"
    )


@pytest.mark.parametrize("carry", ["batch_stats", nnx.Linear, (nnx.BatchStat, 3)])
def test_a_carry_that_is_no_class_of_variables(carry):
    with pytest.raises(
        ValueError, match=r"carry is a class of nnx\.Variable, such as nnx\.BatchStat"
    ):
        jaxckpt.nnx.Stack(functools.partial(nnx.BatchNorm, WIDTH), 3, carry=carry, rngs=nnx.Rngs(0))


class Sows(Keeps):
    def __call__(self, x):
        self.seen = nnx.Intermediate((x,))  # what `sow` does
        return x


class Overwrites(Keeps):
    def __call__(self, x):
        self.inner.bias[...] = x[0]
        return x


class Counts(Keeps):
    def __call__(self, x):
        self.late = True
        return x


class Static(Keeps):
    def __init__(self, *, rngs):
        self.shift = jax.random.normal(rngs.params(), (WIDTH,))


@pytest.mark.skipif(not hasattr(nnx, "is_data"), reason="this Flax keeps any array as data")
def test_an_array_that_flax_would_leak_is_refused():
    with pytest.raises(ValueError, match=r"array shift of the block.*self\.shift = nnx\.data"):
        jaxckpt.nnx.Stack(Static, 3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "block, message",
    [
        (functools.partial(Keeps, nnx.BatchStat, late=True), r"changes extra \(BatchStat\)"),
        (functools.partial(Keeps, nnx.Param, late=True), r"the block changes extra \(Param\) when"),
        (functools.partial(Sows, nnx.Param), r"seen.*\(Intermediate.*what is sown beside th"),
        (
            functools.partial(Overwrites, nnx.Param),
            r"changes inner\.bias \(Param\) when.*into the carry",
        ),
        (functools.partial(Counts, nnx.Param), "the block changes an attribute when"),
    ],
)
def test_blocks_that_change_themselves_are_refused_when_they_are_called(block, message):
    stack = jaxckpt.nnx.Stack(block, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        stack(X)


def test_what_is_captured_is_refused_by_name():
    if not hasattr(nnx, "capture"):
        pytest.skip("this Flax captures nothing")

    class Captured(Keeps):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "norm", x.mean())
            return self.inner(x)

    run = nnx.capture(lambda stack, x: stack(x), nnx.Intermediate)
    make = functools.partial(Captured, nnx.Param)
    with pytest.raises(ValueError, match=r"Intermediate.*return what is sown beside the carry"):
        run(jaxckpt.nnx.Stack(make, 3, rngs=nnx.Rngs(0)), X)
    plain = functools.partial(nnx.Linear, WIDTH, WIDTH)
    assert run(jaxckpt.nnx.Stack(plain, 3, rngs=nnx.Rngs(0)), X)[0].shape == X.shape


def test_a_module_that_blocks_would_share_is_refused():
    class Shares(nnx.Module):
        def __init__(self, shared, *, rngs):
            self.inner, self.shared = nnx.Linear(WIDTH, WIDTH, rngs=rngs), shared

        def __call__(self, x):
            return self.shared(self.inner(x))

    shared = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    blocks = (functools.partial(Shares, shared), lambda rngs: Shares(shared, rngs=rngs))
    for block in blocks:
        with pytest.raises(ValueError, match=r"block's shared.* is made outside of the block"):
            jaxckpt.nnx.Stack(block, 3, rngs=nnx.Rngs(0))


def test_an_instance_is_no_class():
    with pytest.raises(ValueError, match=r"nnx\.Stack takes the class Mlp or.*not an instance"):
        jaxckpt.nnx.Stack(Mlp(rngs=nnx.Rngs(0)), 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"nnx\.Stack takes a module class.*, not 3"):
        jaxckpt.nnx.Stack(3, Mlp, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_plan_errors():
    make = functools.partial(jaxckpt.nnx.Stack, Mlp, rngs=nnx.Rngs(0))
    for num_blocks, plan, message in (
        (3, "sqrtt", "sqrt"),
        (3, "5xfull", "covers 5 blocks, the stack has 3"),
        (0, "full", "a stack of 0 blocks"),
        (2.0, "full", "num_blocks is a whole number of blocks, not 2.0"),
    ):
        with pytest.raises(PlanError, match=message):
            make(num_blocks, remat=plan)
    with pytest.raises(PlanError, match=r"names:nope matches no tag of the block.*hidden"):
        make(3, remat="names:nope")(X)
    with pytest.raises(ValueError, match="unroll is a whole number"):
        make(3, unroll=0)(X)
    with pytest.raises(ValueError, match=r"rngs is an nnx\.Rngs.*not 0"):
        jaxckpt.nnx.Stack(Mlp, 3, rngs=0)
    with pytest.raises(ValueError, match=r"carry changes from float32\[4, 6\] to float32\[4, 3\]"):
        jaxckpt.nnx.Stack(functools.partial(nnx.Linear, 6, 3), 3, rngs=nnx.Rngs(0))(X)
