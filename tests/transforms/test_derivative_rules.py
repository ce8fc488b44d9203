"""Names of what derivative rules make: those of a custom_vjp have some, others have none."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

import jaxckpt
from tests.transforms.invented_cases import ROWS, arguments, close, step


@jax.custom_vjp
def norm(x):
    """A norm whose rule hands on the inverse rms, which the function does not return."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True))


def _norm_rule(x):
    inverse = jax.lax.rsqrt((x * x).mean(-1, keepdims=True))
    return x * inverse, (x, inverse)


def _norm_reversed(kept, grad):
    x, inverse = kept
    y = x * inverse
    return (inverse * (grad - y * (grad * y).mean(-1, keepdims=True)),)


norm.defvjp(_norm_rule, _norm_reversed)


def _kernel(x_ref, out_ref, lse_ref):
    x = x_ref[...]
    lse_ref[...] = jnp.log(jnp.exp(x).sum(-1, keepdims=True))
    out_ref[...] = jnp.exp(x - lse_ref[...])


def _run_kernel(x):
    shapes = [jax.ShapeDtypeStruct(s, x.dtype) for s in (x.shape, (x.shape[0], 1))]
    return pl.pallas_call(_kernel, out_shape=shapes, interpret=True)(x)


@jax.custom_vjp
def softmax(x):
    """A kernel that returns its log-sum-exp beside its output, as attention kernels do."""
    return _run_kernel(x)[0]


def _softmax_rule(x):
    out, lse = _run_kernel(x)
    return out, (x, out, lse)


def _softmax_reversed(kept, grad):
    x, out, lse = kept
    return (jnp.exp(x - lse) * (grad - (grad * out).sum(-1, keepdims=True)),)


softmax.defvjp(_softmax_rule, _softmax_reversed)


def rows_by_name(run, plan: str) -> dict:
    """Returns what `explain` says of a block, by the names that it shows."""
    rows, x = arguments()
    row = {"w": rows["w"][0]}
    return {r.name: r for r in jaxckpt.explain(run, row, x, plan=plan).rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    "inside",
    [
        lambda fn: fn,
        jax.jit,
        lambda fn: lambda x: jax.vmap(fn)(x[None])[0],
    ],
    ids=["plain", "jit", "vmap"],
)
def test_what_only_the_rule_of_a_custom_vjp_makes_has_a_name(inside):
    """One number a row, which the function itself computes on its way and does not return."""

    def run(x, row):
        return x + inside(norm)(x @ row["w"])

    name = "@rsqrt.1"
    found = {plan: rows_by_name(run, plan)[name] for plan in ("full", f"names:{name}")}
    assert found["full"].decision == "recomputed"
    assert found[f"names:{name}"].decision == "saved"
    assert found[f"names:{name}"].saved_bytes == 4 * ROWS


@pytest.mark.slow
def test_a_rules_kernel_whose_arrays_are_all_kept_is_not_run_again():
    def run(x, row):
        return x + softmax(x @ row["w"])

    both = "names:@softmax.1,@pallas_call.1"
    found = {}
    for plan in ("none", "full", both):
        fn, args = step(plan, run)
        compiled = jax.jit(fn).lower(*args).compile()
        found[plan] = compiled.as_text().count(" log("), compiled(*args)
    assert [count for count, _ in found.values()] == [1, 2, 1]
    close(found[both][1], found["none"][1])


def test_a_kernels_arrays_are_shown_by_their_names():
    """A kernel that is no attention is not called so: the policy `attention` would refuse it."""

    def run(x, row):
        return x + softmax(x @ row["w"])

    row = rows_by_name(run, "names:@pallas_call.1")["@softmax.1"]
    assert (row.decision, row.num_arrays, row.saved_bytes) == ("partly saved", 2, 4 * ROWS)


@pytest.mark.parametrize(
    ("fn", "name"),
    [(jnp.sin, "cos"), (jnp.tanh, "sub"), (jax.nn.relu, "gt")],
    ids=["sin", "tanh", "relu"],
)
def test_what_other_derivatives_make_has_none(fn, name):
    """The rules of primitives and of `jax.custom_jvp`: no name reaches what they alone make."""
    if (fn, jax.__version_info__ >= (0, 12)) == (jnp.tanh, True):
        pytest.skip("since jax 0.12 tanh's derivative keeps tanh alone")

    def run(x, row):
        return x + fn(x @ row["w"])

    row = rows_by_name(run, "names:@*")[name]
    assert row.residual_bytes and row.decision == "recomputed"
    with pytest.raises(jaxckpt.PlanError, match=r"; what only the derivative of a primitive or of"):
        step(f"names:@{name}.1", run)[0](*step("none")[1])
