# %% [markdown]
# # Train under a checkpointing plan
#
# A plan says which values of the forward pass are kept for the backward pass; the others are computed
# again. Here a small Transformer is trained under several plans: the losses are the same, the memory is
# not. It runs in about two minutes on a CPU, and on a GPU or TPU as it is.

# %%
import pathlib

# Where jaxckpt comes from: the checkout this notebook lies in. Elsewhere, say on Colab, the address of
# its repository: "git+https://...".
SOURCE = pathlib.Path.cwd().parent.as_uri()
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
# Bytes of the source text of Python's own standard library. A batch is random windows of it, a function
# of the step's number, so that all runs see the same.

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
# The bundled Transformer takes a plan as `remat`. Its parameters do not depend on the plan.

# %%
config = TransformerConfig(num_blocks=12, dtype="float32", attention="plain")
optimizer = optax.adamw(3e-3)
params = Transformer(config).init(jax.random.key(0), batch(0)[:, :-1])["params"]


def step_for(plan):
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


state = params, optimizer.init(params)

# %% [markdown]
# ## What a step needs, before it runs
#
# `measure` compiles the step and reads the memory from the compiler. State is donated, as it is when
# training: without that it would be there twice.

# %%
reports = {
    plan: jaxckpt.measure(step_for(plan), state, batch(0), donate_argnums=0)
    for plan in ("none", "full", "sqrt", "log")
}
for plan, report in reports.items():
    print(f"{plan:5} {report.temp_bytes / 2**20:6.1f} MiB of temporaries, {report.flops:.2e} FLOPs")
assert reports["none"].temp_bytes > reports["full"].temp_bytes > reports["log"].temp_bytes

# %% [markdown]
# ## Train
#
# Under `none` and under `log`, which keeps five block inputs of twelve blocks.

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
print({plan: f"{values[0]:.3f} to {values[-1]:.3f} nats a byte" for plan, values in losses.items()})
assert losses["log"][-1] < losses["log"][0] - 1
np.testing.assert_allclose(losses["log"], losses["none"], rtol=2e-2)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
left.bar(list(reports), [report.temp_bytes / 2**20 for report in reports.values()])
left.set(title="Temporaries of one step", ylabel="MiB")
for (plan, values), style in zip(losses.items(), ("-", "--"), strict=True):
    right.plot(values, style, label=plan)
right.set(title="Loss", xlabel="step", ylabel="nats a byte")
right.legend()
figure.tight_layout()

# %% [markdown]
# ## Next
#
# - `will_it_fit.ipynb`: the same question for a chip that is not there.
# - `your_own_block.ipynb`: a block of your own.
# - `python -m experiments.train --remat=sqrt` in the repository trains with checkpoints, validation and a
#   record of the run.
