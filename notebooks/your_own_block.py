# %% [markdown]
# # A block of your own
#
# Any function `block(carry, params_i) -> carry` can run under any plan. This notebook takes such a block, looks
# at what its backward pass saves, and finds a plan for a stack of it. It runs in a minute on a CPU.

# %%
import pathlib

# Where jaxckpt comes from: the checkout that this notebook is in. Elsewhere, say on Colab, write the address
# of a repository here: "git+https://...".
SOURCE = pathlib.Path.cwd().parent.as_uri()
if SOURCE.startswith("file:") and not pathlib.Path("../jaxckpt").is_dir():
    raise RuntimeError(
        "this notebook is not in a checkout of jaxckpt; open it in the notebooks folder of one, or set "
        "SOURCE above to the address of a repository: git+https://..."
    )
# %pip install --quiet "jaxckpt @ {SOURCE}"

# %%
import jax
import jax.numpy as jnp

import jaxckpt
from jaxckpt.memory import findings

# %% [markdown]
# ## The block
#
# A gated block with a norm. `jaxckpt.tag` names two values; it does nothing by itself. What differs from
# block to block, such as a dropout key, travels with the parameters.

# %%
NUM_BLOCKS, WIDTH, ROWS = 16, 64, 256


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def block(x, params):
    y = norm(x)
    gate = jaxckpt.tag(y @ params["gate"], "gate")
    up = jaxckpt.tag(y @ params["up"], "up")
    y = (jax.nn.silu(gate) * up) @ params["down"]
    keep = jax.random.bernoulli(params["key"], 0.9, y.shape)
    return jaxckpt.tag(x + jnp.where(keep, y / 0.9, 0), "out")


def stacked(key):
    keys = jax.random.split(key, 4)
    shape = lambda a, b: (NUM_BLOCKS, a, b)
    return {
        "gate": 0.1 * jax.random.normal(keys[0], shape(WIDTH, 4 * WIDTH)),
        "up": 0.1 * jax.random.normal(keys[1], shape(WIDTH, 4 * WIDTH)),
        "down": 0.1 * jax.random.normal(keys[2], shape(4 * WIDTH, WIDTH)),
        "key": jax.random.split(keys[3], NUM_BLOCKS),
    }


params = stacked(jax.random.key(0))
keys = params.pop("key")  # a key has no gradient
x = jax.random.normal(jax.random.key(1), (ROWS, WIDTH))

# %% [markdown]
# ## What its backward pass saves
#
# Nothing is run. Each line is an array that the backward pass needs: where it is made, its size, and what it
# would cost to recompute it.

# %%
one = jax.tree.map(lambda leaf: leaf[0], {**params, "key": keys})
print(jaxckpt.explain(block, one, x, num_blocks=NUM_BLOCKS, plan="names:gate,up"))

# %% [markdown]
# A name that saves nothing is found. `out` is the block's output, which the next block saves as its input
# anyway:

# %%
found = findings.findings_of_block(block, one, x, plan="names:gate,up,out")
print(*found, sep="\n")
assert [one_finding.code for one_finding in found] == ["tag-on-output"]

# %% [markdown]
# ## A stack of it
#
# The same loss and gradients under every plan, with dropout; other memory, other work. Each stage
# is a loop of its own, so in such a small stack `4xfull/names:gate,up` needs more memory than `names:gate,up`.


# %%
def loss(params, x, plan):
    blocks = {**params, "key": keys}
    return jnp.square(jaxckpt.scan_blocks(block, blocks, x, remat=plan)).mean()


step = jax.jit(jax.value_and_grad(loss), static_argnums=2)
want = step(params, x, "none")
for plan in ("none", "dots", "names:gate,up", "full", "4xfull/names:gate,up", "sqrt", "log"):
    value, gradients = step(params, x, plan)
    assert jnp.allclose(value, want[0], rtol=1e-5)
    for name in params:
        assert jnp.allclose(gradients[name], want[1][name], rtol=1e-4, atol=1e-6), (plan, name)
    report = jaxckpt.measure(step, params, x, plan, static_argnums=2)
    print(
        f"{plan:22} {report.temp_bytes / 2**20:6.2f} MiB of temporaries, {report.flops:.2e} FLOPs"
    )

# %% [markdown]
# ## The fastest plan inside a budget


# %%
def step_for(plan):
    return jax.value_and_grad(lambda params, x: loss(params, x, plan)), (params, x)


result = jaxckpt.fit(step_for, num_blocks=NUM_BLOCKS, budget="14MiB")
print(result)
assert result.report.peak_bytes <= result.budget_bytes

# %% [markdown]
# A budget that nothing fits is an error that says the least one, and the plan that reaches it:

# %%
try:
    jaxckpt.fit(step_for, num_blocks=NUM_BLOCKS, budget="1MiB")
except jaxckpt.BudgetError as error:
    print(error)
    assert error.least_bytes > 2**20
else:
    raise AssertionError("1 MiB is less than the parameters weigh")

# %% [markdown]
# ## Next
#
# Flax Linen and NNX modules become stacks in one line, `jaxckpt.linen.Stack` and `jaxckpt.nnx.Stack`:
# `docs/your_own_model.md` in the repository changes an existing model of each.
