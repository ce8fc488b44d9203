"""Plans rank as they should in what XLA says they need."""

import jax
import jax.numpy as jnp

import jaxckpt


def temp_bytes(block, params, carry, plan: str) -> int:
    def loss(params, carry):
        return jaxckpt.scan_blocks(block, params, carry, remat=plan).sum()

    return jaxckpt.measure(jax.grad(loss), params, carry).temp_bytes


def test_none_above_dots_above_full():
    def block(x, w):
        h = jnp.tanh(x @ w["in"])
        return x + jnp.sin(h * jnp.cos(h)) @ w["out"]

    params = {"in": jnp.ones((8, 64, 256)), "out": jnp.ones((8, 256, 64))}
    carry = jnp.ones((512, 64))
    none, dots, full = (temp_bytes(block, params, carry, p) for p in ("none", "dots", "full"))
    assert none > dots > full


def test_full_above_sqrt_above_log_on_a_deep_stack_with_large_carries():
    def block(x, w):
        return x + jnp.tanh(x * w)

    params = jnp.ones((64, 1))
    carry = jnp.ones((1024, 1024))
    full, sqrt, log = (temp_bytes(block, params, carry, p) for p in ("full", "sqrt", "log"))
    assert full > sqrt > log
    carry_bytes = carry.size * 4
    assert full > 60 * carry_bytes
    assert sqrt < 22 * carry_bytes
    assert log < 13 * carry_bytes
