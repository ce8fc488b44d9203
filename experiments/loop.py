"""Loops over time under a plan: train a small recurrent network, fit a simulation, draw memory.

python -m experiments.loop --remat=sqrt
python -m experiments.loop --task=diffusion --length=400 --remat=binomial:16 -o memory.svg

`memory`: a recurrent network learns to repeat a number that it saw many steps ago. `diffusion`: the
speed at which heat spreads is fitted to the sensors of another simulation. Both print their losses,
and the temporaries of the gradient under the plan and under `none`. With `-o` memory is drawn
against the number of steps: plain, two scans nested by hand, and the plan.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from experiments import files, plotting
from experiments.cli import main
from experiments.config import check_least
from jaxckpt.plans import Plan
from jaxckpt.units import iec

_SHOWN = 5  # lines of losses


def loop(
    *,
    task: Annotated[Literal["memory", "diffusion"], Parameter(help="What is trained.")] = "memory",
    length: Annotated[int, Parameter(help="Steps of the loop.")] = 256,
    remat: Annotated[str, Parameter(help="A checkpointing plan, such as sqrt.")] = "sqrt",
    steps: Annotated[int, Parameter(help="Training steps.")] = 100,
    out: Annotated[
        Path | None,
        Parameter(name=("--out", "-o"), help="File: .svg or .png, memory against steps."),
    ] = None,
):
    """Train a loop over time under a plan, and print the memory of its gradient."""
    plan = Plan.parse(remat)
    check_least(1, length=length, steps=steps)
    plan.bind(length)
    if out is not None:
        files.check_output(out, plotting.FIGURES)
        plotting.import_matplotlib()
    import jax

    import jaxckpt

    made = TASKS[task](length)
    ours = functools.partial(jaxckpt.scan, remat=plan)
    before, after = (temp_bytes(made, scan) for scan in (jax.lax.scan, ours))
    shown = f"{task}, {length} steps: the gradient's temporaries take {iec(after)} under {plan}"
    print(f"{shown}, {iec(before)} under none")
    for step, loss in train(made, ours, steps):
        if step % max(1, steps // _SHOWN) == 0 or step == steps:
            print(f"step {step:4}  loss {loss:.5f}")
    if out is not None:
        lengths = sorted({max(4, length * n // 8) for n in (1, 2, 4, 6, 8)})
        plotting.save(_figure(task, plan, lengths), out)
        print(f"drawn: {out}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A loop to train: the first weights, `loss(weights, key, scan)`, and Adam's learning rate.

    `scan` is `lax.scan` or a function like it.
    """

    weights: Any
    loss: Callable
    rate: float


def memory(length: int) -> Task:
    """Returns a recurrent network that repeats the first of its inputs at the end."""
    import jax
    import jax.numpy as jnp

    rows, width = 16, 64
    keys = jax.random.split(jax.random.key(0), 3)
    scaled = lambda key, *shape: jax.random.normal(key, shape) / math.sqrt(shape[0])
    weights = {
        "gate": scaled(keys[0], width + 1, width),
        "new": scaled(keys[1], width + 1, width),
        "out": scaled(keys[2], width, 1),
    }

    def loss(weights, key, scan):
        inputs = jax.random.normal(key, (length, rows, 1))

        def step(h, x):
            both = jnp.concatenate([h, x], -1)
            # A gate that begins nearly closed keeps the first input.
            gate = jax.nn.sigmoid(both @ weights["gate"] - 4)
            h = h + gate * (jnp.tanh(both @ weights["new"]) - h)
            return h, h @ weights["out"]

        first = jnp.tanh(inputs[0] @ weights["new"][-1:])
        _, outputs = scan(step, first, inputs)
        return ((outputs[-1] - inputs[0]) ** 2).mean()

    return Task(weights=weights, loss=loss, rate=3e-3)


def diffusion(length: int) -> Task:
    """Returns the diffusion of heat on a rod, whose speed is fitted to eight sensors."""
    import jax.numpy as jnp
    from jax import lax

    rod = jnp.exp(-200 * (jnp.linspace(0, 1, 512) - 0.5) ** 2)

    def simulate(speed, scan):
        def step(heat, _):
            spread = jnp.roll(heat, 1) + jnp.roll(heat, -1) - 2 * heat
            return heat + speed * spread, heat[::64]  # what eight sensors read

        return scan(step, rod, None, length)[1]

    wanted = simulate(0.4, lax.scan)
    error = lambda speed, scan: ((simulate(speed, scan) - wanted) ** 2).mean()
    loss = lambda weights, key, scan: 1e3 * error(weights["speed"], scan)
    return Task(weights={"speed": jnp.float32(0.1)}, loss=loss, rate=1e-2)


TASKS = {"memory": memory, "diffusion": diffusion}


def train(task: Task, scan: Callable, steps: int):
    """Yields `(step, loss)` of each training step."""
    import jax
    import optax

    optimizer = optax.adam(task.rate)

    @jax.jit
    def update(weights, state, key):
        loss, grads = jax.value_and_grad(task.loss)(weights, key, scan)
        changes, state = optimizer.update(grads, state)
        return optax.apply_updates(weights, changes), state, loss

    weights, state = task.weights, optimizer.init(task.weights)
    for step in range(1, steps + 1):
        weights, state, loss = update(weights, state, jax.random.key(step))
        yield step, float(loss)


def temp_bytes(task: Task, scan: Callable) -> int:
    """Returns the temporaries of a task's gradient, as compiled here."""
    import jax

    import jaxckpt

    gradient = lambda weights, key: jax.grad(task.loss)(weights, key, scan)
    return jaxckpt.measure(gradient, task.weights, jax.random.key(0)).temp_bytes


def segments_of(length: int) -> int:
    """Returns the number of equal segments nearest to the square root of a length, from below."""
    return max(n for n in range(1, math.isqrt(length) + 1) if length % n == 0)


def nested(f, init, xs=None, length: int = 0):
    """Returns the results of `lax.scan`, by two nested scans, each checkpointed."""
    import jax
    from jax import lax

    steps = length or len(jax.tree.leaves(xs)[0])
    segments = segments_of(steps)
    cut = lambda x: x.reshape(segments, -1, *x.shape[1:])
    inner = lambda carry, xs: lax.scan(jax.checkpoint(f), carry, xs, steps // segments)
    carry, ys = lax.scan(jax.checkpoint(inner), init, jax.tree.map(cut, xs), segments)
    return carry, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys)


def _figure(task: str, plan: Plan, lengths: list[int]):
    import jax
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  an extra

    import jaxckpt

    ways = {
        "none": jax.lax.scan,
        "two scans by hand": nested,
        str(plan): functools.partial(jaxckpt.scan, remat=plan),
    }
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for (name, scan), colour, mark in zip(ways.items(), plotting.CYCLE, "os^", strict=False):
        found = [temp_bytes(TASKS[task](n), scan) / 2**10 for n in lengths]
        axes.plot(lengths, found, label=name, color=colour, marker=mark)
    axes.set(xlabel="steps of the loop", ylabel="temporaries of the gradient, KiB", yscale="log")
    axes.set_title(f"{task}: memory against steps", loc="left")
    axes.legend()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


if __name__ == "__main__":
    main(loop)
