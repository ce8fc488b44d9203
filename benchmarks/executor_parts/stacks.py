"""The stacks that the parts of `benchmarks.executor` run, and the plans they run them under."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxckpt
from jaxckpt.plans import Plan
from jaxckpt.schedules.of_stage import stack_schedule_of
from jaxckpt.schedules.schedule import Schedule


def schedule(plan: str, num_blocks: int) -> Schedule:
    """Returns the schedule of a plan of one stage that has one: not `none`, not `full`."""
    (stage,) = Plan.parse(plan).bind(num_blocks).stages
    found = stack_schedule_of(stage)
    assert found is not None, plan
    return found


def plans(num_blocks: int) -> tuple[str, ...]:
    """Returns plans of every schedule with small, middling and extreme arguments that fit."""
    root = math.isqrt(num_blocks - 1) + 1
    fitting = lambda *numbers: sorted({n for n in numbers if 1 <= n <= num_blocks})
    return (
        *(f"uniform:{n}" for n in fitting(1, 2, root, num_blocks)),
        *(f"every:{n}" for n in fitting(1, 3, num_blocks)),
        "sqrt",
        "log",
        *(f"binomial:{n}" for n in fitting(1, 2, 4, 8, num_blocks)),
    )


def dropout_block(x, block_i, scale):
    """A residual MLP with dropout and a const that all blocks share."""
    hidden = jnp.tanh(x @ block_i["w"] + block_i["b"])
    keep = jax.random.bernoulli(block_i["key"], 0.8, hidden.shape)
    return x + jnp.where(keep, hidden * scale, 0.0) @ block_i["v"]


def dropout_stack(num_blocks: int, width: int = 16, batch: int = 4):
    """Returns `(params, keys, carry, scale)` for `num_blocks` of `dropout_block`."""
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "w": 0.3 * jax.random.normal(keys[0], (num_blocks, width, 2 * width)),
        "b": 0.1 * jax.random.normal(keys[1], (num_blocks, 2 * width)),
        "v": 0.3 * jax.random.normal(keys[2], (num_blocks, 2 * width, width)),
    }
    carry = jax.random.normal(keys[3], (batch, width))
    return params, jax.random.split(keys[4], num_blocks), carry, jnp.full((2 * width,), 1.1)


def light_block(x, w):
    """A block whose weight is next to nothing beside its carry."""
    return x + jnp.tanh(x * w)


def heavy_block(x, w):
    """A block whose weights are far larger than its carry."""
    return x + jnp.tanh(x @ w)


def gradients(block: Callable, plan: str, **options) -> Callable:
    """Returns `fn(params, carry) -> gradients of both` of the sum of the stack's output."""

    def loss(params, carry):
        return jaxckpt.scan_blocks(block, params, carry, remat=plan, **options).sum()

    return jax.grad(loss, argnums=(0, 1))


def largest_difference(tree, expected) -> float:
    """Returns the largest difference of a leaf, relative to that leaf's largest value."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
    return max((_difference(np.asarray(a), np.asarray(b)) for a, b in pairs), default=0.0)


def _difference(got: np.ndarray, want: np.ndarray) -> float:
    if not np.isfinite(got).all():
        return math.inf
    return float(np.max(np.abs(got - want)) / max(np.max(np.abs(want)), 1e-30))


def temp_bytes(compiled: Any) -> int:
    """Returns the temporary bytes of a compiled function, as XLA counts them."""
    return compiled.memory_analysis().temp_size_in_bytes
