"""Where float32 weights become bfloat16: once before the stack's loops, by rows of the table."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxckpt
from jaxckpt.models import Transformer, TransformerConfig, next_token_loss
from jaxckpt.transforms.jaxprs import equations, subjaxprs
from tests.models import steps

PLANS = ("none", "full", "dots", "attention", "sqrt", "uniform:2", "2xfull/log")


def step(plan: str, dtype: str = "bf16"):
    return steps.gradients(plan, dtype=dtype, attention="plain")


def loops(jaxpr):
    return [e for e in equations(jaxpr) if e.primitive.name in ("scan", "while")]


def casts_of_weights(jaxpr) -> int:
    """Returns the casts, inside loops, of float32 arrays that have a weight's shape."""
    config = steps.config()
    inner, outer = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = {(config.d_model, inner), (inner, config.d_model), (config.d_model, outer)}
    weights |= {(config.d_model, config.d_ff), (config.d_ff, config.d_model)}
    found = 0
    for loop in loops(jaxpr):
        for body in subjaxprs(loop):
            found += sum(
                e.primitive.name == "convert_element_type"
                and e.invars[0].aval.dtype == jnp.float32
                and e.invars[0].aval.shape in weights
                for e in equations(body)
            )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_no_loop_casts_a_weight(plan):
    fn, args, _ = step(plan)
    assert casts_of_weights(jax.make_jaxpr(fn)(*args)) == 0


def test_without_the_stacks_dtype_the_loops_cast(monkeypatch):
    """The twin: each of the seven weights is cast forward, again, and its gradient back."""
    monkeypatch.setattr(jaxckpt.linen.stack, "in_dtype", lambda params, dtype: params)
    fn, args, _ = step("full")
    assert casts_of_weights(jax.make_jaxpr(fn)(*args)) >= 14


def test_gradients_and_parameters_are_float32():
    fn, (params, tokens), _ = step("full")
    _, gradients = jax.eval_shape(fn, params, tokens)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, gradients)
    chex.assert_type(jax.tree.leaves(gradients), jnp.float32)


class Half(nn.Module):
    """A block that computes in bfloat16 and keeps float32 parameters."""

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(8, dtype="bfloat16")(nn.tanh(x))


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["none", "full", "sqrt", "uniform:2"])
def test_casting_early_changes_no_bit(plan):
    x = jnp.linspace(-1, 1, 32).reshape(4, 8).astype("bfloat16")
    stack = lambda dtype: jaxckpt.linen.Stack(Half, 5, remat=plan, dtype=dtype)
    params = stack(None).init(jax.random.key(0), x)
    chex.assert_trees_all_equal(params, stack("bfloat16").init(jax.random.key(0), x))
    loss = lambda params, dtype: stack(dtype).apply(params, x).astype(jnp.float32).sum()
    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    chex.assert_trees_all_equal(run(params, "bfloat16"), run(params, None))


@pytest.mark.slow
def test_a_frequent_tokens_gradient_is_summed_in_float32():
    """A thousand small gradients of one row: in bfloat16 the sum stops growing."""
    config = TransformerConfig(
        **{"num_blocks": 1, "d_model": 16, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16},
        **{"d_ff": 16, "tied_embeddings": False, "dtype": "bf16"},
    )
    tokens = jnp.zeros([1, 1025], jnp.int32)
    exact = dataclasses.replace(config, dtype="f32")
    params = Transformer(exact).init(jax.random.key(0), tokens)["params"]

    def gradient(config):
        def loss(params):
            x = Transformer(config).apply({"params": params}, tokens[:, :-1], method="features")
            return next_token_loss(x, params, tokens[:, 1:], config)

        return jax.grad(loss)(params)["embed_tokens"]["embedding"][0]

    half, full = gradient(config), gradient(exact)
    assert np.abs(half - full).max() < 0.05 * np.abs(full).max()


def test_the_rotary_table_has_no_gradient():
    """It is a const of the stack: a gradient of it would be made and summed up in every block."""
    from jaxckpt.models.transformer import rotary_table, rotate

    x, table = jnp.ones([1, 8, 2, 16]), rotary_table(8, 16, 1e4)
    of_x, of_table = jax.grad(lambda *args: rotate(*args).sum(), (0, 1))(x, table)
    assert np.abs(of_x).max() > 0 and not np.abs(of_table).any()


def names_offered(plan: str) -> str:
    """Returns the names that the block has under a plan that asks for one that it has not."""
    config = steps.config(dtype="bf16", attention="plain")
    model = Transformer(config, remat=plan, unroll=config.num_blocks)
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)
    with pytest.raises(jaxckpt.PlanError) as caught:
        jax.eval_shape(model.apply, params, tokens)
    return str(caught.value).partition("it has: ")[2]


def test_a_name_means_the_same_value_whatever_the_other_stages_keep():
    """Blocks cast their own rows if all are checkpointed, and get them cast if one is not."""
    alone, mixed = names_offered("names:@none.1"), names_offered("1xnone/names:@none.1")
    assert "@cast.2" in alone and alone == mixed
