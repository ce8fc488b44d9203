"""Every plan gives the loss and gradients of `none`; its twin is test_recompute.py.

Bit-equal where JAX allows it: float32, on CPU, blocks in a loop. Gradients of consts are sums over
the blocks, which plans may associate differently.
"""

import jax
import pytest

import jaxckpt
from tests.transforms import cases

EXACT = jax.__version__.startswith("0.10.")
LENGTHS = (1, 2, 3, 5, 7, 12, 13, 28, 64)
CONSTS_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def expected():
    found = {}

    def get(num_blocks, unroll=1):
        key = num_blocks, unroll
        if key not in found:
            found[key] = cases.run(num_blocks, "none", unroll=unroll)
        return found[key]

    return get


def check(got, want, tolerance=0.0 if EXACT else 1e-6):
    loss, (params, carry, *consts) = got
    want_loss, (want_params, want_carry, *want_consts) = want
    assert cases.relative_error(loss, want_loss) <= tolerance
    assert cases.relative_error(params, want_params) <= tolerance
    assert cases.relative_error(carry, want_carry) <= tolerance
    assert cases.relative_error(consts, want_consts) <= CONSTS_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_blocks", [pytest.param(n, marks=() if n == 7 else pytest.mark.heavy) for n in LENGTHS]
)
@pytest.mark.parametrize("pattern", cases.PLANS)
def test_plan_equals_none_with_dropout(pattern, num_blocks, expected):
    plan = cases.plan_for(pattern, num_blocks)
    check(cases.run(num_blocks, plan), expected(num_blocks))


@pytest.mark.heavy
@pytest.mark.parametrize("num_blocks", (1, 7, 13))
@pytest.mark.parametrize("plan", ("uniform:1", "sqrt", "sqrt+offload:carry", "log"))
def test_nested_plan_equals_none(plan, num_blocks, expected):
    check(cases.run(num_blocks, plan, nested=True), expected(num_blocks))


@pytest.mark.slow
def test_stages_of_every_kind_in_one_plan(expected):
    plan = "3xnone/2xdots/5xuniform:2/4xsqrt/6xlog/5xbinomial:2/full"
    check(cases.run(28, plan), expected(28))


@pytest.mark.heavy
@pytest.mark.parametrize("plan", ("full", "dots", "uniform:2", "log"))
@pytest.mark.parametrize("unroll", (2, 3, 100))
def test_unrolled_plan_equals_none_at_the_same_unroll(plan, unroll, expected):
    check(cases.run(7, plan, unroll=unroll), expected(7, unroll), tolerance=1e-6)


@pytest.mark.slow
def test_without_jit(expected):
    params, carry, scale = cases.dropout_stack(5)
    fn = cases.value_and_grads(cases.dropout_block, params, carry, scale, remat="binomial:2")
    with jax.disable_jit(False):
        got = fn.__wrapped__(params, carry, scale)
    check(got, expected(5), tolerance=1e-6)


@pytest.mark.slow
def test_dropout_matters():
    """The masks differ between blocks and from no dropout, or the tests above show nothing."""
    params, carry, scale = cases.dropout_stack(4)
    with_masks = jaxckpt.scan_blocks(cases.dropout_block, params, carry, scale)
    other = {**params, "key": params["key"][::-1]}
    assert (
        cases.relative_error(
            jaxckpt.scan_blocks(cases.dropout_block, other, carry, scale), with_masks
        )
        > 1e-3
    )
