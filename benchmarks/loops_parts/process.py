"""One model at one length under every method, a line of JSON each. Run by `benchmarks.loops`.

There are two models. `rnn` is a gated recurrent step: its carry is 8 KiB, its output is 512 bytes a
step, and it closes over its weights. `reaction` is reaction and diffusion on a grid: its carry is
the grid, and its output is the mean of one field. The loss reads every output. All methods
differentiate the same step.
"""

import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jaxckpt
from benchmarks.executor_parts import stacks
from benchmarks.record import device
from experiments.loop import nested, segments_of

_REPEATS = 5
Scan = Callable[..., tuple[Any, Any]]  # (f, init, xs) -> (carry, ys)


def rnn(length: int) -> tuple[Callable, Any, Any, Any]:
    """Returns `(step(weights), weights, init, xs)`; the carry is float32 `[16, 128]`."""
    rows, width, inputs = 16, 128, 8
    keys = jax.random.split(jax.random.key(0), 5)
    scaled = lambda key, shape: jax.random.normal(key, shape) / math.sqrt(shape[0])
    weights = {
        "gates": scaled(keys[0], (width, 2 * width)),
        "new": scaled(keys[1], (width, width)),
        "in": scaled(keys[2], (inputs, 3 * width)),
        "out": scaled(keys[3], (width, inputs)),
    }

    def step(weights):
        def f(h, x):
            given = jnp.split(x @ weights["in"], 3, axis=-1)
            reset, update = jnp.split(jax.nn.sigmoid(h @ weights["gates"]), 2, axis=-1)
            new = jnp.tanh((reset * h) @ weights["new"] + given[0])
            update = update * jax.nn.sigmoid(given[1]) + 0.1 * jnp.tanh(given[2])
            h = h + update * (new - h)
            return h, h @ weights["out"]

        return f

    xs = jax.random.normal(keys[4], (length, rows, inputs))
    return step, weights, jnp.zeros([rows, width]), xs


def reaction(length: int, side: int) -> tuple[Callable, Any, Any, Any]:
    """Returns `(step(weights), weights, init, xs)` of a Gray-Scott step on a grid, float32."""
    weights = {"feed": jnp.float32(0.04), "kill": jnp.float32(0.06), "rate": jnp.float32(0.2)}

    def spread(x):
        around = sum(jnp.roll(x, shift, axis) for shift in (-1, 1) for axis in (0, 1))
        return around - 4 * x

    def step(weights):
        def f(fields, x):
            u, v = fields
            rate, made = weights["rate"], u * v * v
            new_u = u + rate * spread(u) - made + weights["feed"] * (1 - u) + x
            new_v = v + 0.5 * rate * spread(v) + made - (weights["feed"] + weights["kill"]) * v
            return (new_u, new_v), new_v.mean()

        return f

    grid = jnp.linspace(0, 1, side)
    bump = jnp.exp(-50 * ((grid[:, None] - 0.5) ** 2 + (grid[None] - 0.5) ** 2))
    return step, weights, (1 - 0.5 * bump, 0.25 * bump), 1e-3 * jnp.ones([length])


MODELS = {"rnn": rnn, "reaction": reaction}


def equinox(checkpoints: int | None) -> Scan:
    """Returns Equinox's checkpointed loop with a number of kept states; None: Equinox chooses."""
    from equinox.internal import scan

    return functools.partial(scan, kind="checkpointed", checkpoints=checkpoints)


def methods(length: int) -> dict[str, Scan]:
    """Returns every method by its name; Equinox's methods fail where it is not installed."""
    found = {
        "plain": lax.scan,
        "checkpointed step": lambda f, init, xs: lax.scan(jax.checkpoint(f), init, xs),
        "nested by hand": nested,
        "equinox, 16 states": equinox(16),
        "equinox": equinox(None),
    }
    plans = ("sqrt", f"uniform:{segments_of(length)}", "log", "binomial:16", "binomial:32")
    return found | {plan: functools.partial(jaxckpt.scan, remat=plan) for plan in plans}


def evaluations(method: str, length: int) -> int | None:
    """Returns how many steps run in all; None for Equinox's methods."""
    if method in ("plain", "checkpointed step"):
        return length * (1 + (method != "plain"))
    if method == "nested by hand":
        return 3 * length
    if method.startswith("equinox"):
        return None
    return length + stacks.schedule(method, length).extra_forwards


def measured(model: str, length: int, options: dict, names: list[str]):
    """Yields a row for each method: temporaries, seconds, and how far its gradients are off."""
    step, weights, init, xs = MODELS[model](length, **options)
    expected = None
    for name, scan in methods(length).items():
        if name not in names and name != "plain":
            continue
        row = {"model": model, "length": length, "method": name}

        def loss(weights, init, xs, scan=scan):
            carry, ys = scan(step(weights), init, xs)
            return jnp.sin(ys).sum() + sum(x.sum() for x in jax.tree.leaves(carry)) / 1e3

        try:
            started = time.perf_counter(), time.process_time()
            fn = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(weights, init, xs).compile()
            row["compile_seconds"] = time.perf_counter() - started[0]
            row["compile_cpu_seconds"] = time.process_time() - started[1]
            row["temp_bytes"] = stacks.temp_bytes(fn)
            found = jax.block_until_ready(fn(weights, init, xs))
        except (ImportError, jax.errors.JaxRuntimeError) as error:
            yield row | {"error": str(error).splitlines()[0]}
            continue
        expected = found if expected is None else expected
        yield row | {
            "error_of_gradients": stacks.largest_difference(found, expected),
            "evaluations": evaluations(name, length),
            **_seconds(lambda fn=fn: jax.block_until_ready(fn(weights, init, xs))),
            "device": device(),
        }


def _seconds(run: Callable) -> dict[str, float]:
    """Returns the medians of wall time and of this process's CPU time, in seconds."""
    wall, process = [], []
    for _ in range(_REPEATS):
        started = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - started[0])
        process.append(time.process_time() - started[1])
    return {"seconds": statistics.median(wall), "cpu_seconds": statistics.median(process)}


if __name__ == "__main__":
    for one in measured(*map(json.loads, sys.argv[1:])):
        print(json.dumps(one), flush=True)
