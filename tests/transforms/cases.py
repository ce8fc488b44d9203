"""Blocks, plans and comparisons that the tests of transforms share."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxckpt

WIDTH, BATCH = 16, 4

# Every kind of stage, policies included; {n} is replaced by something that fits L blocks.
PLANS = (
    "full",
    "dots",
    "dots_no_batch",
    "names:hidden",
    "names:h*+dots_no_batch",
    "offload:hidden",
    "offload:carry",
    "uniform:{n}",
    "uniform:{n}+dots",
    "every:{n}",
    "sqrt",
    "sqrt+offload:carry",
    "log",
    "binomial:{n}",
)


def plan_for(pattern: str, num_blocks: int) -> str:
    """Returns a plan of the pattern that fits."""
    return pattern.format(n=max(1, min(3, num_blocks - 1)))


def dropout_block(x, block_i, scale):
    """A residual MLP with dropout, a tagged hidden value and a const that all blocks share."""
    # The tag is before the nonlinearity, whose derivative would ask for the untagged value.
    hidden = jnp.tanh(jaxckpt.tag(x @ block_i["w"] + block_i["b"], "hidden"))
    keep = jax.random.bernoulli(block_i["key"], 0.8, hidden.shape)
    return x + jnp.where(keep, hidden * scale, 0.0) @ block_i["v"]


def dropout_stack(num_blocks: int, seed: int = 0):
    """Returns `(params, carry, scale)` for `num_blocks` of `dropout_block`."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "w": 0.3 * jax.random.normal(keys[0], (num_blocks, WIDTH, 2 * WIDTH)),
        "b": 0.1 * jax.random.normal(keys[1], (num_blocks, 2 * WIDTH)),
        "v": 0.3 * jax.random.normal(keys[2], (num_blocks, 2 * WIDTH, WIDTH)),
        "key": jax.random.split(keys[3], num_blocks),
    }
    return params, jax.random.normal(keys[0], (BATCH, WIDTH)), jnp.full((2 * WIDTH,), 1.1)


def value_and_grads(block, params, carry, *consts, **options):
    """Returns a jitted loss of the stack with gradients of parameters, carry and consts."""
    keys = params.pop("key") if isinstance(params, dict) and "key" in params else None

    def loss(params, carry, *consts):
        if keys is not None:
            params = {**params, "key": keys}
        return jnp.sin(jaxckpt.scan_blocks(block, params, carry, *consts, **options)).sum()

    argnums = tuple(range(2 + len(consts)))
    return jax.jit(jax.value_and_grad(loss, argnums=argnums))


def run(num_blocks: int, plan: str, **options):
    """Returns `(loss, (params, carry, consts) gradients)` of the dropout stack."""
    params, carry, scale = dropout_stack(num_blocks)
    fn = value_and_grads(dropout_block, params, carry, scale, remat=plan, **options)
    return fn(params, carry, scale)


def relative_error(tree, expected) -> float:
    """Returns the largest difference of a leaf, relative to that leaf's largest value."""
    errors = jax.tree.map(
        lambda a, b: float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)), tree, expected
    )
    return max(jax.tree.leaves(errors))


class Counter:
    """Counts, at run time, how often each block is evaluated."""

    def __init__(self):
        self.counts: dict[int, int] = {}

    def __call__(self, index):
        index = int(index)
        self.counts[index] = self.counts.get(index, 0) + 1

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def count_evaluations(num_blocks: int, plan, **options) -> Counter:
    """Returns how often each block ran in one evaluation of loss and gradients."""
    counter = Counter()

    def block(x, block_i):
        jax.debug.callback(counter, block_i["index"])
        return jnp.tanh(x @ block_i["w"])

    index = jnp.arange(num_blocks)
    w = 0.5 * jnp.ones((num_blocks, 4, 4))

    def loss(w):
        blocks = {"w": w, "index": index}
        return jaxckpt.scan_blocks(block, blocks, jnp.ones((2, 4)), remat=plan, **options).sum()

    jax.block_until_ready(jax.jit(jax.grad(loss))(w))
    jax.effects_barrier()
    return counter
