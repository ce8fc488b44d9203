"""Steps that the planner's tests fit: few weights, so that what blocks keep sets the peak."""

import jax
import jax.numpy as jnp

import jaxckpt
from jaxckpt.costs.roofline import Rates
from jaxckpt.planner.places import following, held_together
from jaxckpt.planner.steps import Steps
from jaxckpt.plans import Plan
from jaxckpt.targets.target import LOCAL

NUM_BLOCKS, ROWS, WIDTH = 6, 256, 16
CHIP = Rates(flops_per_second=1e11, bytes_per_second=1e10, host_bytes_per_second=1e10)


def block(x, block_i, scale):
    """A residual MLP with dropout and two tags."""
    hidden = jnp.tanh(jaxckpt.tag(x @ block_i["w"], "hidden"))
    keep = jax.random.bernoulli(block_i["key"], 0.8, hidden.shape)
    wide = jax.nn.gelu(jaxckpt.tag(jnp.where(keep, hidden * scale, 0.0) @ block_i["u"], "wide"))
    return x + wide @ block_i["v"]


def arguments(num_blocks: int = NUM_BLOCKS, rows: int = ROWS):
    """Returns the arrays of a step."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"w": (WIDTH, 2 * WIDTH), "u": (2 * WIDTH, 4 * WIDTH), "v": (4 * WIDTH, WIDTH)}
    params = {
        name: 0.2 * jax.random.normal(key, (num_blocks, *shape))
        for (name, shape), key in zip(shapes.items(), keys, strict=False)
    }
    return params, jax.random.normal(keys[3], (rows, WIDTH)), jax.random.key(1)


def step_for(plan, num_blocks: int = NUM_BLOCKS, rows: int = ROWS, block=block):
    """Returns loss and gradients of a stack with dropout, and abstract arguments."""

    def loss(params, x, key):
        rows_i = {**params, "key": jax.random.split(key, num_blocks)}
        out = jaxckpt.scan_blocks(block, rows_i, x, jnp.ones(2 * WIDTH), remat=plan)
        return jnp.sin(out).sum()

    args = jax.eval_shape(lambda: arguments(num_blocks, rows))
    return jax.value_and_grad(loss, argnums=(0, 1)), args


def stacks_of(step_for, *, plan: str = "full", other: str = "none"):
    """Returns the stacks of a step that follow its plan."""
    of = Steps(step_for, LOCAL)
    one, two = (Plan.parse(text) for text in (plan, other))
    phases = of.trace(one).phases
    found = following(phases, one, of.trace(two).phases, two)
    return [place.call.stack for place in held_together(phases, found)]


BOTH = {"first": 4, "second": 3}
SIDE = 4096


def both(plan):
    """Returns gradients of two stacks with almost no weights, of arrays larger than on-chip memory.

    Args:
      plan: Plans, or their texts, by name.
    """
    block = lambda x, scale: jnp.sin(jaxckpt.tag(jnp.tanh(x * scale), "inner")) * x

    def loss(scales, x):
        for name in BOTH:
            x = jaxckpt.scan_blocks(block, scales[name], x, remat=plan[name])
        return x.sum()

    scales = {n: jax.ShapeDtypeStruct((count, 1), jnp.float32) for n, count in BOTH.items()}
    return jax.grad(loss), (scales, jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)), ()
