# %% [markdown]
# # Out of memory on a T4
#
# A T4 has 14.6 GiB of memory. This notebook has a training step that does not fit there, and a plan under which it
# does. On a GPU it runs out of memory first and then trains. On a CPU it shows what the compiler says about the
# same step, and trains a small one.

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
import numpy as np
import optax

import jaxckpt
from jaxckpt.models import Transformer, TransformerConfig, next_token_loss

device = jax.devices()[0]
ON_GPU = device.platform == "gpu"
print("jax", jax.__version__, "on", device.device_kind)

# %% [markdown]
# ## The step
#
# A Transformer with 24 blocks of width 768 and 24 sequences of 512 tokens, in float32 (a T4 has no bfloat16). Its
# parameters, with AdamW's two moments, are about 2 GiB.

# %%
LARGE = TransformerConfig(
    num_blocks=24,
    d_model=768,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    d_ff=2304,
    dtype="float32",
    attention="plain",
)
SMALL = TransformerConfig(num_blocks=12, dtype="float32", attention="plain")
optimizer = optax.adamw(optax.warmup_constant_schedule(0.0, 3e-4, 20))


def init(config):
    params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 8), int))["params"]
    return params, optimizer.init(params)


def step_for(config, plan):
    """Returns a training step under a plan."""
    model = Transformer(config, remat=plan)

    def loss(params, tokens):
        x = model.apply({"params": params}, tokens[:, :-1], method="features")
        return next_token_loss(x, params, tokens[:, 1:], config)

    def step(state, tokens):
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return step


# %% [markdown]
# ## What it needs, before it runs
#
# `measure` takes shapes, so nothing is allocated. The numbers are of the compiler of this machine's device.

# %%
shapes = jax.eval_shape(lambda: init(LARGE)), jax.ShapeDtypeStruct((24, 513), jnp.int32)
peaks = {}
for plan in ("none", "full", "sqrt"):
    report = jaxckpt.measure(step_for(LARGE, plan), *shapes, donate_argnums=0)
    peaks[plan] = report.peak_bytes / 2**30
    print(f"{plan:5} {peaks[plan]:6.2f} GiB at the peak")
assert peaks["none"] > 14.6 > 10.9 > peaks["full"]

# %% [markdown]
# A T4 has 14.6 GiB, of which JAX takes 10.9 GiB by default. `none` does not fit. `full` fits: it saves the input of
# each block and recomputes the rest.
#
# ## Run it
#
# On a GPU, first under `none`: if the GPU is a T4, this is the error that everybody knows. Then under `full`.


# %%
def in_use(name):
    stats = device.memory_stats() or {}
    size = stats.get(name)
    return "not reported by this device" if size is None else f"{size / 2**30:.2f} GiB"


def train(config, plan, batch, length, steps):
    step = jax.jit(step_for(config, plan), donate_argnums=0)
    state, losses = jax.jit(lambda: init(config))(), []
    for i in range(steps):
        starts = np.random.default_rng(i).integers(0, 256, (batch, 1))
        tokens = (starts + np.arange(length + 1)) % 256  # the next byte is the last one plus one
        state, value = step(state, tokens.astype(np.int32))
        losses.append(float(value))
    return losses


config, batch, length = (LARGE, 24, 512) if ON_GPU else (SMALL, 4, 64)
print("before:", in_use("bytes_in_use"))
try:
    losses = train(config, "none", batch, length, steps=2)
    print("this device has room for none:", in_use("peak_bytes_in_use"), "at the peak")
except jax.errors.JaxRuntimeError as error:
    print(str(error).split("\n")[0][:200])
    assert "RESOURCE_EXHAUSTED" in str(error)

# %%
losses = train(config, "full", batch, length, steps=30)
print(f"{losses[0]:.3f} to {losses[-1]:.3f} nats per byte")
print("after:", in_use("bytes_in_use"), "in use,", in_use("peak_bytes_in_use"), "at the peak")
assert losses[-1] < losses[0]

# %% [markdown]
# ## Next
#
# - `train.ipynb`: why the plan does not change what is learned.
# - `will_it_fit.ipynb`: the same question for a chip that you do not have.
# - `jaxckpt.fit` finds the fastest plan for a budget: `docs/planner.md` in the repository.
