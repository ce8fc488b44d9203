# %% [markdown]
# # Will it fit?
#
# Which plans fit a chip that you do not have yet, and which of them is the fastest? The compiler of the
# chip knows, and it runs on a CPU: here a training step is compiled for one TPU v5e, under about
# eight plans. On two cores each takes some tens of seconds. Nothing is allocated, and no TPU is needed.

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
# %pip install --quiet "jaxckpt[tpu] @ {SOURCE}"

# %%
import os

# libtpu is here to compile. This process stays on what it has, and looks for no TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import jaxckpt
from jaxckpt.models import Transformer, TransformerConfig, next_token_loss

TARGET = "v5e-1"

# %% [markdown]
# ## A step, as shapes alone
#
# A Transformer of 24 blocks, sequences of 1024 tokens, AdamW. `jax.eval_shape` makes parameters and optimizer
# state as shapes. All you need is a step and its arguments, so your own step works too.

# %%
config = TransformerConfig(
    vocab_size=8192,
    num_blocks=24,
    d_model=512,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    d_ff=1536,
    dtype="bfloat16",
    attention="plain",
)
optimizer = optax.adamw(3e-4)
tokens = jax.ShapeDtypeStruct((8, 1025), jnp.int32)


def init():
    params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 8), int))["params"]
    return params, optimizer.init(params)


def step_for(plan):
    """Returns a step under a plan, its arguments, and what is donated."""
    model = Transformer(config, remat=plan)

    def loss(params, tokens):
        x = model.apply({"params": params}, tokens[:, :-1], method="features")
        return next_token_loss(x, params, tokens[:, 1:], config)

    def step(state, tokens):
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return step, (jax.eval_shape(init), tokens), {"donate_argnums": 0}


# %% [markdown]
# ## Ask for each plan

# %%
reports = {}
for plan in ("none", "full", "log"):
    step, args, options = step_for(plan)
    reports[plan] = jaxckpt.measure(step, *args, target=TARGET, **options)
    left = reports[plan].headroom_bytes / 2**30
    print(f"{plan:10} {reports[plan].peak_bytes / 2**30:6.2f} GiB at the peak, {left:6.2f} left")
assert reports["none"].peak_bytes > reports["full"].peak_bytes > reports["log"].peak_bytes

# %% [markdown]
# A report has more: the parts of the peak, the largest buffers and the lines of code that make them.

# %%
print(reports["full"])

# %% [markdown]
# ## Ask for the fastest that fits
#
# A budget between those peaks. The planner finds the fastest plan inside it and compiles it to be sure. A
# plan that it returns was compiled, and its peak is inside the budget.

# %%
budget = (reports["full"].peak_bytes + reports["none"].peak_bytes) // 2
found = jaxckpt.fit(step_for, num_blocks=config.num_blocks, target=TARGET, budget=budget)
print(found)
assert found.report.peak_bytes <= budget

# %%
figure, axes = plt.subplots(figsize=(8, 3.5))
peaks = {
    **{plan: one.peak_bytes for plan, one in reports.items()},
    "chosen": found.report.peak_bytes,
}
axes.bar(list(peaks), [peak / 2**30 for peak in peaks.values()])
axes.axhline(budget / 2**30, color="black", linestyle="--", label="budget")
axes.set(title=f"Peak of one step on {TARGET}", ylabel="GiB")
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## Next
#
# - Other chips: `target="v6e-4"`, or `"h100"` with `jaxckpt[cuda13]` in place of `jaxckpt[tpu]`.
# - `python -m experiments.fit --config configs/qwen3_0p6b.toml --target v5e-1 --plan auto --budget auto`
#   in the repository does all of this from a configuration file.
