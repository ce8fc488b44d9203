# %% [markdown]
# # Train under a checkpointing plan
#
# A plan says which values of the forward pass are saved for the backward pass; the others are recomputed.
# Here a small Transformer is trained under several plans: the gradients are the same, the memory is not. It
# runs in about two minutes on a CPU, and on a GPU or TPU as it is.

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
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxckpt
from jaxckpt.models import Transformer, TransformerConfig, next_token_loss

print("jax", jax.__version__, "on", jax.devices()[0].device_kind)

# %% [markdown]
# ## Data
#
# Bytes of the source text of Python's own standard library. A batch is random windows of it. It depends only
# on the number of the step, so all runs see the same batches.

# %%
folder = pathlib.Path(pathlib.__file__).parent
folder = folder.parent if folder.name == "pathlib" else folder
text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
data = np.frombuffer(text, np.uint8).astype(np.int32)
BATCH, LENGTH = 8, 128


def batch(step):
    starts = np.random.default_rng(step).integers(0, len(data) - LENGTH - 1, BATCH)
    return np.stack([data[start : start + LENGTH + 1] for start in starts])


print(f"{len(data):,} bytes; a batch is {batch(0).shape}")

# %% [markdown]
# ## Model and step
#
# The bundled Transformer takes a plan as `remat`. Its parameters do not depend on the plan. The learning rate
# rises over the first 20 steps (warm-up).

# %%
config = TransformerConfig(num_blocks=12, dtype="float32", attention="plain")
optimizer = optax.adamw(optax.warmup_constant_schedule(0.0, 3e-3, 20))
params = Transformer(config).init(jax.random.key(0), batch(0)[:, :-1])["params"]


def loss_for(plan):
    """Returns the loss of a batch under a plan."""
    model = Transformer(config, remat=plan)

    def loss(params, tokens):
        x = model.apply({"params": params}, tokens[:, :-1], method="features")
        return next_token_loss(x, params, tokens[:, 1:], config)

    return loss


def step_for(plan):
    """Returns a training step under a plan."""

    def step(state, tokens):
        params, moments = state
        value, gradients = jax.value_and_grad(loss_for(plan))(params, tokens)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return step


state = params, optimizer.init(params)

# %% [markdown]
# ## What a step needs, before it runs
#
# `measure` compiles the step and reads the memory from the compiler. *Temporaries* are saved activations,
# gradients and working memory. The state is donated, as in training: its memory is used for the new state.

# %%
reports = {
    plan: jaxckpt.measure(step_for(plan), state, batch(0), donate_argnums=0)
    for plan in ("none", "dots_no_batch", "full", "log")
}
for plan, report in reports.items():
    print(
        f"{plan:13} {report.temp_bytes / 2**20:6.1f} MiB of temporaries, {report.flops:.2e} FLOPs"
    )
assert reports["none"].temp_bytes > reports["full"].temp_bytes > reports["log"].temp_bytes

# %% [markdown]
# ## The same gradients
#
# The gradients of one step under each plan, against those under `none`. The difference is relative to the
# largest value of each parameter's gradient.


# %%
def difference(ours, theirs):
    of_leaf = lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max())
    return max(jax.tree.leaves(jax.tree.map(of_leaf, ours, theirs)))


gradients = {plan: jax.jit(jax.grad(loss_for(plan)))(params, batch(0)) for plan in reports}
differences = {plan: difference(gradients[plan], gradients["none"]) for plan in reports}
for plan, found in differences.items():
    print(f"{plan:13} {found:.1e}")
assert max(differences.values()) < 1e-5

# %% [markdown]
# They are equal up to the rounding of float32: XLA adds the same numbers in another order.
#
# ## Train
#
# Under `none` and under `log`, which saves five block inputs of twelve blocks.

# %%
STEPS = 60


def train(plan):
    step = jax.jit(step_for(plan), donate_argnums=0)
    now = jax.tree.map(jnp.copy, state)
    losses = []
    for i in range(STEPS):
        now, value = step(now, batch(i))
        losses.append(float(value))
    return losses


losses = {plan: train(plan) for plan in ("none", "log")}
for plan, values in losses.items():
    print(f"{plan:5} {values[0]:.4f}, {values[10]:.4f} at step 10, {values[-1]:.4f} at the end")
assert losses["log"][-1] < losses["log"][0] - 1
np.testing.assert_allclose(losses["log"][:10], losses["none"][:10], rtol=1e-3)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
left.bar(list(reports), [report.temp_bytes / 2**20 for report in reports.values()])
left.set(title="Temporaries of one step", ylabel="MiB")
for (plan, values), style in zip(losses.items(), ("-", "--"), strict=True):
    right.plot(values, style, label=plan)
right.set(title="Loss", xlabel="step", ylabel="nats per byte")
right.legend()
figure.tight_layout()

# %% [markdown]
# The curves lie on each other at first and may part a little later. This is not a wrong gradient. The two
# gradients of a step differ by rounding, about 1e-7 of their size. AdamW divides each gradient by its own size,
# so where a gradient is nearly zero a tiny difference can change the whole update, and the next step starts from
# other parameters. The difference grows from step to step, faster with a high learning rate and without warm-up.
# Two runs of one plan on two kinds of GPU part in the same way. So compare plans by the gradients of one step, or
# by their first losses.
#
# ## Next
#
# - `will_it_fit.ipynb`: the same question for a chip that you do not have.
# - `out_of_memory.ipynb`: a step that does not fit a T4 until it has a plan.
# - `your_own_block.ipynb`: a block of your own.
# - `python -m experiments.train --remat=sqrt` in the repository trains with checkpoints, validation and a
#   record of the run.
